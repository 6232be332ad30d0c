"""How fast brains learn, and how much of the machine's matrix-product rate their training uses."""

from __future__ import annotations

import contextlib
import time
from statistics import median

from bench.common import table

BATCH = 64
MATRIX = 1024  # side of the square matrices that measure the machine
RECORD = 33  # training pictures a second of the 244 M brain at 224×224 that this project continues: batch 100, a GPU of the H200's class


def flops_of(step) -> int:
    """Floating-point operations of one call, forward and backward, attention counted."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _AllTogether()  # its own stumbles over layers that are used without a gradient
    with sdpa_kernel(SDPBackend.MATH), counter:  # as plain products, attention is counted on the CPU
        step()
    return counter.get_total_flops()


class _AllTogether(contextlib.nullcontext):
    """Tells the counter that every operation belongs to the whole."""

    parents = {"Global"}


def share_of_products(brain, lesson, device: str, rounds: int, seconds: float, small=None) -> dict:
    """Steps of training (pictures made, forward, backward, AdamW) in turn with products of square matrices on the same device.

    Operations are counted in a step of `small` where it is given, a lesson with fewer pictures of the same kinds, and are taken to grow with the pictures.
    """
    import torch

    wide = device == "cuda" and torch.cuda.is_bf16_supported()  # `lab.train` computes in bf16 on a GPU, in fp32 on a CPU
    optimizer = torch.optim.AdamW(brain.parameters(), lr=1e-4, fused=True)
    side = MATRIX if device == "cpu" else 8 * MATRIX
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16 if wide else torch.float32)
    count, seen, see = 0, 0, brain.see

    def counted(images):
        nonlocal seen
        seen += len(images) * (images.shape[1] if images.ndim == 5 else 1)
        return see(images)

    brain.see = counted  # steps differ: those of some skills have more pictures

    def settle():
        if device == "cuda":
            torch.cuda.synchronize()

    def learn(lesson=lesson) -> int:
        """A step; how many pictures it saw."""
        nonlocal count
        before = seen
        with torch.autocast(device, torch.bfloat16, enabled=wide):
            loss, _ = lesson(brain, count)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(brain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        count += 1
        return seen - before

    def multiply() -> int:
        """Some products; how many operations they are."""
        for _ in range(4):
            matrix @ matrix
        return 4 * 2 * side**3

    def rate(work, seconds):
        """What `work` returns per second of wall time, and of CPU time."""
        settle()
        done, start, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - start < seconds:
            done += work()
            settle()
        taken = time.perf_counter() - start
        return done / taken, done / max(time.process_time() - cpu, 1e-9)

    learn()
    pictures = []
    flops = flops_of(lambda: pictures.append(learn(small or lesson))) / pictures[0]  # of a picture
    count = 1  # where the lesson went on making steps ahead
    learn(), multiply()
    steps, before = count, seen
    speeds, shares, products, per_cpu = [], [], [], []
    for _ in range(rounds):
        speed, cpu_speed = rate(learn, seconds)
        speeds.append(speed), per_cpu.append(cpu_speed)
        products.append(rate(multiply, seconds / 4)[0])
        shares.append(speed * flops / products[-1])
    brain.see = see
    return {
        "pictures a step": round((seen - before) / (count - steps), 1),
        "GFLOP a picture": round(flops / 1e9, 3),
        "pictures per second": round(median(speeds), 1),
        "pictures per CPU second": round(median(per_cpu), 1),
        "matrix products, GFLOP/s": round(median(products) / 1e9, 1),
        "training, GFLOP/s": round(median(speeds) * flops / 1e9, 1),
        "share of the matrix-product rate": round(median(shares), 4),
    }


def main(quick: bool = False) -> tuple[dict, str]:
    import torch

    from compute_layers.brain.model import Brain, brain_config
    from compute_layers.brain.words import Words
    from compute_layers.skills.lessons import QuestionLesson
    from compute_layers.skills.questions import vocabulary_texts
    from compute_layers.skills.raising import RaiseLesson
    from compute_layers.skills.school import GROWN, all_texts

    before = torch.get_num_threads()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    first, all_words = Words.from_texts(vocabulary_texts()), Words.from_texts(all_texts())

    def first_questions():
        return Brain(brain_config("tiny"), first).to(device), QuestionLesson(first, batch=BATCH, device=device), None

    def raising(name, plain):
        """A brain of this size and the lesson of `nbs/raise.ipynb` with so many plain rooms a step."""
        brain = Brain(brain_config(name, **GROWN), all_words).to(device)

        def lesson(plain, workers=-1):
            part = plain // 4
            return RaiseLesson(all_words, size=brain.config.size, device=device, plain=plain, bare=2 * part, painted=part, drawn_rooms=2 * part, own_rooms=part, recalled_rooms=part, workers=workers)

        return lambda: (brain, lesson(plain), None if device == "cpu" else lesson(min(plain // 16 * 4, 24), workers=0))

    lessons = {"tiny, first questions": first_questions, "tiny, all skills": raising("tiny", 24)}
    if device == "cuda":
        lessons |= {"base, all skills": raising("base", 384), "journal, all skills": raising("journal", 24)}
    rounds, seconds = (2, 0.5) if quick else (7, 2.0)
    results, rows = {"device": device}, []
    for name, make in lessons.items():
        for threads in (1, 2) if device == "cpu" else (1,):
            torch.set_num_threads(threads)
            brain, lesson, small = make()
            entry = results[f"{name}, threads {threads}"] = share_of_products(brain, lesson, device, rounds, seconds, small)
            rows.append([name, threads, *(f"{v:.1%}" if k.startswith("share") else f"{v:,}" for k, v in entry.items())])
    torch.set_num_threads(before)
    text = (
        f"A step of a lesson: rooms made and drawn {'by processes on the CPU while the GPU learns' if device == 'cuda' else 'on the cpu'}, asked about, forward, backward, AdamW. The machine's rate is that of products of square "
        f"matrices with the same arithmetic and threads, measured in turn with the training, wall time. `journal` has the size of the brain that this project "
        f"continues (244 M, 224×224), which saw {RECORD} pictures a second on a GPU of the H200's class; it is measured where there is a GPU.\n\n"
    )
    if device == "cuda":
        text += "Operations are counted in a smaller lesson, and taken to grow with the pictures. A step of all skills is thousands of small kernels, so that its time hardly grows with the batch.\n\n"
    heads = ["lesson", "threads", "pictures a step", "GFLOP a picture", "pictures/s", "pictures per CPU s", "products, GFLOP/s", "training, GFLOP/s", "share"]
    return results, text + table(heads, rows) + "\n"
