"""How fast the tiny brain learns, and how much of the machine's matrix-product rate its training uses."""

from __future__ import annotations

import time
from statistics import median

from bench.common import table

BATCH = 64
MATRIX = 1024  # side of the square matrices that measure the machine


def flops_of(step) -> int:
    """Floating-point operations of one call, forward and backward, attention counted."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # as plain products, attention is counted on the CPU
        step()
    return counter.get_total_flops()


def main(quick: bool = False) -> tuple[dict, str]:
    import torch

    from compute_layers.brain.model import Brain, brain_config
    from compute_layers.brain.words import Words
    from compute_layers.skills.lessons import QuestionLesson
    from compute_layers.skills.questions import vocabulary_texts

    before = torch.get_num_threads()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wide = device == "cuda" and torch.cuda.is_bf16_supported()  # `lab.train` computes in bf16 on a GPU, in fp32 on a CPU
    torch.manual_seed(0)
    words = Words.from_texts(vocabulary_texts())
    brain = Brain(brain_config("tiny"), words).to(device)
    lesson = QuestionLesson(words, batch=BATCH, device=device)
    optimizer = torch.optim.AdamW(brain.parameters(), lr=1e-4, fused=True)
    matrix = torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16 if wide else torch.float32)
    count = 0

    def settle():
        if device == "cuda":
            torch.cuda.synchronize()

    def learn():
        nonlocal count
        with torch.autocast(device, torch.bfloat16, enabled=wide):
            loss, _ = lesson(brain, count)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(brain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        count += 1

    def multiply():
        for _ in range(4):
            matrix @ matrix

    def rate(work, seconds):
        """Calls per second of wall time, and CPU seconds per second."""
        settle()
        calls, start, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - start < seconds:
            work()
            settle()
            calls += 1
        taken = time.perf_counter() - start
        return calls / taken, calls / max(time.process_time() - cpu, 1e-9)

    learn()
    step_flops = flops_of(learn)
    rounds, seconds = (2, 0.5) if quick else (7, 2.0)
    results, rows = {"flops a step": step_flops, "device": device, "arithmetic": "bf16" if wide else "fp32"}, []
    for threads in (1, 2) if device == "cpu" else (1,):
        torch.set_num_threads(threads)
        learn(), multiply()
        steps, shares, products, per_cpu = [], [], [], []
        for _ in range(rounds):
            step_rate, step_cpu_rate = rate(learn, seconds)
            product_rate, product_cpu_rate = rate(multiply, seconds / 4)
            steps.append(step_rate)
            per_cpu.append(step_cpu_rate)
            products.append(product_rate * 4 * 2 * MATRIX**3)
            shares.append(step_rate * step_flops / products[-1])
        entry = {
            "pictures per second": round(BATCH * median(steps)),
            "questions per second": round(BATCH * lesson.each * median(steps)),
            "pictures per CPU second": round(BATCH * median(per_cpu)),
            "matrix products, GFLOP/s": round(median(products) / 1e9, 1),
            "training, GFLOP/s": round(median(steps) * step_flops / 1e9, 1),
            "share of the matrix-product rate": round(median(shares), 3),
        }
        results[f"threads {threads}"] = entry
        rows.append([threads, *(f"{v:.0%}" if k.startswith("share") else f"{v:,}" for k, v in entry.items())])
    torch.set_num_threads(before)
    text = (
        f"One step of the tiny brain's lesson in `tutorialQA` (making and drawing {BATCH} rooms, asking {lesson.each} questions about each, "
        f"forward, backward, AdamW): {step_flops / 1e9:.1f} GFLOP, on the {device} in {results['arithmetic']}. The machine's rate is that of "
        f"{MATRIX} × {MATRIX} products with the same threads, measured in turn with the training, wall time.\n\n"
    )
    heads = ["threads", "pictures/s", "questions/s", "pictures per CPU s", "products, GFLOP/s", "training, GFLOP/s", "share"]
    return results, text + table(heads, rows) + "\n"
