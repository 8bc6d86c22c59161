# SPDX-License-Identifier: Apache-2.0
"""Recipes are ordered rules; targets say what they compute with."""

import pytest

from pgxport.errors import UsageError
from pgxport.exporter.recipe import Recipe, Rule, Scheme
from pgxport.exporter.recipes import RECIPES
from pgxport.exporter.targets import TARGETS

TOWERS = Recipe(
    "t", (Rule("vision_tower.*", Scheme("float32")), Rule("*.mlp.*", Scheme("float16")), Rule("*", Scheme("bfloat16")))
)


@pytest.mark.parametrize(
    ("weight", "dtype"),
    [
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "float32"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "float16"),
        ("language_model.model.norm.weight", "bfloat16"),
    ],
)
def test_the_first_rule_that_matches_wins(weight, dtype):
    assert TOWERS.scheme(weight).dtype == dtype


def test_a_weight_no_rule_matches_is_an_error():
    with pytest.raises(UsageError, match="'r' has no rule for 'lm_head'"):
        Recipe("r", (Rule("vision_tower.*", Scheme()),)).scheme("lm_head")


def test_every_named_recipe_ends_with_a_rule_for_everything_else():
    for name, recipe in RECIPES["cuda"].items():
        assert recipe.name == name
        assert recipe.rules[-1].pattern == "*"


def test_a_target_names_what_it_computes_with_when_it_cannot():
    assert TARGETS["cpu"].compute("float16") == TARGETS["cpu"].compute("bfloat16") == "float32"
    assert TARGETS["cuda"].compute("float16") == "float16"
    with pytest.raises(UsageError, match="'cpu' does not compute with float64 weights; it does with float32, float16, bfloat16"):
        TARGETS["cpu"].compute("float64")
