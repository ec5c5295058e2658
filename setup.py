"""Read the facts that nbdev keeps in settings.ini; everything else is in pyproject.toml."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
facts = settings["DEFAULT"]
extras = {name: facts[f"{name}_requirements"].split() for name in ("notebook", "dev")}

setup(
    version=facts["version"],
    description=facts["description"],
    install_requires=facts["requirements"].split(),
    extras_require=extras,
)
