"""Package metadata, all of it read from settings.ini (nbdev 2 reads the same file)."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf8")
cfg = config["DEFAULT"]
extras = {key.removeprefix("extra_"): cfg[key].split() for key in cfg if key.startswith("extra_")}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    packages=find_packages(include=["compute_layers", "compute_layers.*"]),
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": ["compute_layers=compute_layers.lab.commands:main"],
        "gymnasium.envs": ["__root__=compute_layers.game.envs:register_environments"],
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
