"""Recipes: one flat YAML file says all of a run, in the keys of the alignment-handbook and of `TrainingArguments`.

>>> recipe = load_recipe("recipes/tiny/sft/config_full.yaml", ["--learning_rate", "1e-4"], stage="sft")

Relative paths (`model_name_or_path`, `dataset_mixer`, `output_dir`) are relative to the working directory; only
`extends` is relative to the recipe that says it. Imports in milliseconds: standard library and PyYAML only.
"""

from mambalign.recipe.schema import (
    NO_REFERENCE,
    PAIR_STAGES,
    STAGES,
    Recipe,
    key_default,
    key_groups,
    key_help,
    key_types,
    load_recipe,
)
from mambalign.recipe.splits import entry_splits, is_test_split
from mambalign.recipe.values import UserError, read_yaml_map, seconds, type_name
from mambalign.support import nearest

__all__ = [
    "NO_REFERENCE",
    "PAIR_STAGES",
    "STAGES",
    "Recipe",
    "UserError",
    "entry_splits",
    "is_test_split",
    "key_default",
    "key_groups",
    "key_help",
    "key_types",
    "load_recipe",
    "nearest",
    "read_yaml_map",
    "seconds",
    "type_name",
]
