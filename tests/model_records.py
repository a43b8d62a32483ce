"""The committed records of trained models, and the commands that make them again."""

from __future__ import annotations

import json
import re
import shlex

from adapmoe_lab.assets import data_folder
from adapmoe_lab.demo.recipe import Recipe
from adapmoe_lab.demo.train import argument_parser, recipe_from
from adapmoe_lab.models.demo_architecture import DemoArchitecture

DEMO = data_folder() / "demo"
SECOND = data_folder() / "second_model"
THIRD = data_folder() / "third_model"
RECORDS = ("training_record.json", "measurements.json")


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def recorded_recipe(folder):
    record = read(folder, "training_record.json")
    return Recipe(architecture=DemoArchitecture(**record["architecture"]), **record["recipe"])


def recorded_files(folder):
    domains = read(folder, "training_record.json")["domains"]
    return [file for domain in domains.values() for file in domain["files"]]


def documented_commands():
    """Return the recipe of every documented training command, by where it writes."""
    text = (data_folder() / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m adapmoe_lab\.demo\.train (.+)$", text, re.MULTILINE)
    options = [argument_parser().parse_args(shlex.split(line, comments=True)) for line in commands]
    return {str(option.out): recipe_from(option) for option in options}
