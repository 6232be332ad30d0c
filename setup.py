"""Package metadata, all of it read from settings.ini (nbdev 2 reads the same file).

pyproject.toml, which nbdev writes by itself, calls every field dynamic: each one it names has to be set here.
"""
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
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    classifiers=["Development Status :: 3 - Alpha", "Programming Language :: Python :: 3"],
    packages=find_packages(include=["compute_layers", "compute_layers.*"]),
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": ["compute_layers=compute_layers.lab.commands:main"],
        "gymnasium.envs": ["__root__=compute_layers.registration:register_environments"],
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
