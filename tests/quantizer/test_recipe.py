"""Recipes: the types that llama-quantize would choose, and those that this project or the user chooses instead."""

import json
from math import prod
from pathlib import Path

import pytest
from recipe_cases import CASES, RECIPES, packed, shapes

from llamacli.errors import UsageError
from quantize import recipe as module
from quantize.recipe import choose_types, find_recipe

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "recipes.json").read_text())
SCOUT = shapes(CASES["Scout"])


def chosen(name, tensors=SCOUT, overrides=(), imatrix=False):
    """Type names by tensor name."""
    types, _ = choose_types(find_recipe(name), tensors, overrides, imatrix)
    return {tensor: kind.name for tensor, kind in types.items()}


# --- llama.cpp's


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_gets_llama_quantizes_type(case):
    tensors, golden = shapes(CASES[case]), GOLDEN[case]
    for name in RECIPES:
        assert packed(chosen(name, tensors)) == golden[name], name
        assert packed(chosen(name, tensors, imatrix=True)) == golden.get(f"{name} imatrix", golden[name]), name


def test_every_recipe_but_our_own_and_f32_is_held_against_llama_quantize():
    assert set(RECIPES) == set(module.RECIPES) - {"Q4_EXPERTS", "F32"}
    assert all(set(golden) >= set(RECIPES) for golden in GOLDEN.values())


def test_the_order_of_tensors_is_kept_and_does_not_change_types():
    backwards = dict(reversed(SCOUT.items()))
    assert list(chosen("Q4_K_M", backwards)) == list(backwards)
    assert chosen("Q4_K_M", backwards) == chosen("Q4_K_M")


def test_names_in_any_case_and_llama_cpps_short_ones():
    assert find_recipe("q4_k_m") is find_recipe("Q4_K") is find_recipe("Q4_K_M")
    assert find_recipe("Q3_K").name == "Q3_K_M"
    assert find_recipe("Q5_K").name == "Q5_K_M"


def test_an_unknown_recipe_is_a_usage_error_that_names_it_and_the_known_ones():
    with pytest.raises(UsageError, match=r"Q4_EXPERTS.*'Q9_Z'"):
        find_recipe("Q9_Z")


def test_files_of_llama_cpps_recipes_have_its_numbers_and_no_key_of_ours():
    assert find_recipe("Q4_K_M").metadata == {"general.file_type": 15}
    assert find_recipe("IQ4_XS").metadata == {"general.file_type": 30}
    assert find_recipe("F32").metadata == {"general.file_type": 0}
    numbers = [recipe.file_type for recipe in module.RECIPES.values() if recipe.name != "Q4_EXPERTS"]
    assert len(set(numbers)) == len(numbers)


def test_a_recipe_that_needs_an_importance_matrix_says_so():
    assert "--imatrix" in choose_types(find_recipe("Q2_K_S"), SCOUT)[1][0]
    assert not choose_types(find_recipe("Q2_K_S"), SCOUT, imatrix=True)[1]
    assert not choose_types(find_recipe("Q2_K"), SCOUT)[1]


# --- our own


def test_q4_experts_gives_four_bits_to_the_routed_experts_alone():
    types = chosen("Q4_EXPERTS")
    routed = {name for name in types if "_exps." in name}
    assert {types[name] for name in routed} == {"Q4_K"}
    matrices = {name for name, shape in SCOUT.items() if len(shape) > 1 and "ffn_gate_inp" not in name}
    assert {types[name] for name in matrices - routed} == {"Q6_K"}


def test_q4_experts_says_its_name_in_the_file():
    assert find_recipe(module.DEFAULT).metadata == {"general.file_type": 15, "llamacli.recipe": "Q4_EXPERTS"}


# --- what holds for all


@pytest.mark.parametrize("name", module.RECIPES)
def test_vectors_norms_and_routers_stay_f32_against_any_override(name):
    types = chosen(name, SCOUT | {"rope_freqs.weight": (64,)}, [(".", "Q8_0")])
    full = {tensor for tensor, kind in types.items() if kind == "F32"}
    assert full == {tensor for tensor in types if "norm" in tensor or "ffn_gate_inp" in tensor or "rope_freqs" in tensor}


def bits(name, tensors):
    """Bits per weight of a whole file's data."""
    types, _ = choose_types(find_recipe(name), tensors)
    nbytes = sum(types[tensor].row_bytes(shape[-1]) * prod(shape[:-1]) for tensor, shape in tensors.items())
    return 8 * nbytes / sum(map(prod, tensors.values()))


@pytest.mark.parametrize("name", module.RECIPES)
def test_the_bits_shown_in_the_help_are_those_of_scout(name):
    assert find_recipe(name).bits == round(bits(name, SCOUT), 2)


def test_the_docs_show_the_same_table():
    text = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text()
    for recipe in module.RECIPES.values():
        assert f"| `{recipe.name}` | {recipe.bits:.2f} | {recipe.purpose} |" in text


# --- rows that are no whole blocks


def test_rows_that_are_no_multiple_of_256_get_a_type_in_blocks_of_32_with_a_notice():
    tensors = {"blk.0.ffn_up.weight": (8, 96), "blk.0.ffn_gate.weight": (8, 96), "blk.0.attn_q.weight": (8, 256)}
    types, notices = choose_types(find_recipe("Q4_K_S"), tensors)
    assert [kind.name for kind in types.values()] == ["Q5_0", "Q5_0", "Q4_K"]
    assert len(notices) == 1
    assert "2 tensors are Q5_0 instead of Q4_K, their rows are not a multiple of 256: blk.0.ffn_up.weight first" in notices[0]


def test_rows_that_are_no_multiple_of_32_stay_f16():
    types, notices = choose_types(find_recipe("Q6_K"), {"blk.0.ffn_up.weight": (8, 40)})
    assert types["blk.0.ffn_up.weight"].name == "F16"
    assert "F16 instead of Q6_K" in notices[0]


def test_a_type_that_the_user_asks_for_must_fit_the_rows():
    assert chosen("F16", {"blk.0.ffn_up.weight": (8, 96)}, [("ffn_up", "Q6_K")]) == {"blk.0.ffn_up.weight": "Q8_0"}


# --- overrides


def test_of_the_expressions_that_match_the_first_wins():
    types = chosen("Q4_K_S", overrides=[(r"blk\.0\..*_exps", "q8_0"), ("_exps", "Q5_K")])
    assert types["blk.0.ffn_up_exps.weight"] == "Q8_0"
    assert {types[f"blk.{i}.ffn_up_exps.weight"] for i in range(1, 48)} == {"Q5_K"}
    assert types["blk.0.attn_q.weight"] == "Q4_K"


def test_an_expression_is_searched_anywhere_in_the_name():
    assert chosen("Q4_K_S", overrides=[("embd", "Q8_0")])["token_embd.weight"] == "Q8_0"
    assert chosen("Q4_K_S", overrides=[("^embd|_k", "Q8_0")])["token_embd.weight"] == "Q4_K"


def test_an_override_changes_what_it_names_and_nothing_else():
    plain, changed = chosen("Q4_K_M"), chosen("Q4_K_M", overrides=[(r"blk\.3\.attn_v", "F16")])
    assert {name for name in plain if plain[name] != changed[name]} == {"blk.3.attn_v.weight"}


@pytest.mark.parametrize("pattern", ["attn_x", "attn_norm"])
def test_an_expression_that_matches_nothing_to_be_quantized_is_refused(pattern):
    with pytest.raises(UsageError, match=f"found '{pattern}', which matches none"):
        choose_types(find_recipe("Q4_K_S"), SCOUT, [("attn_q", "Q8_0"), (pattern, "Q8_0")])


def test_an_expression_whose_matches_all_went_to_earlier_ones_is_reported():
    overrides = [("attn_(q|k)", "Q6_K"), ("attn_k", "Q4_K"), ("attn_(k|v)", "Q5_K"), ("attn_q", "Q6_K")]
    types, notices = choose_types(find_recipe("Q8_0"), SCOUT, overrides)
    assert [types[f"blk.0.attn_{name}.weight"].name for name in "qkv"] == ["Q6_K", "Q6_K", "Q5_K"]
    assert len(notices) == 2
    for notice, (pattern, kind) in zip(notices, overrides[1::2], strict=True):
        assert f"{pattern!r}" in notice
        assert kind in notice
        assert "before it" in notice


@pytest.mark.parametrize("pattern", ["(", "[", "*", "a{99999999999}", "(?P<a>)(?P<a>)"])
def test_what_is_no_expression_is_a_usage_error(pattern):
    with pytest.raises(UsageError, match="--tensor-type") as caught:
        choose_types(find_recipe("Q4_K_S"), SCOUT, [(pattern, "Q8_0")])
    assert repr(pattern) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["Q9_Z", "", "Q4_K_M", "IQ2_XXS"])
def test_a_type_that_no_tensor_can_be_written_in_is_a_usage_error(kind):
    with pytest.raises(UsageError, match="attn_q") as caught:
        choose_types(find_recipe("Q4_K_S"), SCOUT, [("attn_q", kind)])
    assert repr(kind) in str(caught.value)


@pytest.mark.parametrize("tensors", [{}, {"blk.0.attn_q.weight": (4,)}, {"blk." + "9" * 5000 + ".attn_q.weight": (2, 32)}])
def test_every_recipe_gives_types_for_unusual_sets_of_tensors(tensors):
    for name in module.RECIPES:
        assert chosen(name, tensors).keys() == tensors.keys()
