"""model/inputs.py: conditions of pictures and the table that drops them."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from model.inputs import Drop, SubjectInputs, draw_drops, drop_conditions
from tests.model.tiny_inputs import tiny_inputs


@pytest.fixture
def inputs() -> SubjectInputs:
    return tiny_inputs()


def dropped(inputs: SubjectInputs, kind: Drop) -> SubjectInputs:
    return drop_conditions(inputs, torch.full((len(inputs),), int(kind)))


def changed_fields(before: SubjectInputs, after: SubjectInputs) -> set[str]:
    return {f.name for f in fields(before) if not torch.equal(getattr(before, f.name), getattr(after, f.name))}


def test_nothing_dropped_changes_nothing(inputs) -> None:
    assert changed_fields(inputs, dropped(inputs, Drop.NOTHING)) == set()


def test_text_dropped_is_the_empty_prompt_with_subjects_and_boxes_kept(inputs) -> None:
    after = dropped(inputs, Drop.TEXT)
    assert changed_fields(inputs, after) == {"input_ids", "placeholder_positions"}
    assert torch.equal(after.input_ids, inputs.empty_input_ids)
    assert (after.placeholder_positions == -1).all()


def test_location_dropped_changes_the_boxes_switch_only(inputs) -> None:
    after = dropped(inputs, Drop.LOCATION)
    assert changed_fields(inputs, after) == {"location_keep"}
    assert not after.location_keep.any()


def test_subjects_dropped_is_plain_text_to_image(inputs) -> None:
    after = dropped(inputs, Drop.SUBJECTS)
    assert torch.equal(after.input_ids, inputs.plain_input_ids)
    assert (after.placeholder_positions == -1).all()
    assert not after.subject_keep.any() and not after.location_keep.any()


def test_all_dropped_is_the_empty_prompt_without_subjects(inputs) -> None:
    after = dropped(inputs, Drop.ALL)
    assert torch.equal(after.input_ids, inputs.empty_input_ids)
    assert (after.placeholder_positions == -1).all()
    assert not after.subject_keep.any() and not after.location_keep.any()


def test_each_row_is_dropped_by_its_own_code(inputs) -> None:
    after = drop_conditions(inputs, torch.tensor([Drop.ALL, Drop.NOTHING]))
    assert torch.equal(after.input_ids[0], inputs.empty_input_ids[0])
    assert torch.equal(after.input_ids[1], inputs.input_ids[1])
    assert after.subject_keep.any(dim=1).tolist() == [False, True]


def test_a_padding_subject_or_missing_location_is_never_switched_on(inputs) -> None:
    for kind in Drop:
        after = dropped(inputs, kind)
        assert not (after.subject_keep & ~inputs.subject_keep).any()


def test_rows_repeat_block_by_block(inputs) -> None:
    repeated = inputs.repeat_rows(3)
    assert len(repeated) == 6
    for field in fields(inputs):
        value, original = getattr(repeated, field.name), getattr(inputs, field.name)
        assert torch.equal(value, torch.cat([original] * 3)), field.name


def test_moving_casts_floating_tensors_only(inputs) -> None:
    moved = inputs.to("cpu", torch.bfloat16)
    for field in fields(inputs):
        original, value = getattr(inputs, field.name), getattr(moved, field.name)
        assert value.dtype == (torch.bfloat16 if original.is_floating_point() else original.dtype), field.name
    assert changed_fields(inputs, inputs.to("cpu")) == set()


# --- the table

TABLE = {Drop.ALL: 0.05, Drop.TEXT: 0.05, Drop.LOCATION: 0.05, Drop.SUBJECTS: 0.05}


def test_each_number_falls_into_one_share_in_the_tables_order() -> None:
    uniform = torch.tensor([0.0, 0.049, 0.05, 0.11, 0.16, 0.199, 0.2, 0.999])
    expected = [Drop.ALL, Drop.ALL, Drop.TEXT, Drop.LOCATION, Drop.SUBJECTS, Drop.SUBJECTS, Drop.NOTHING, Drop.NOTHING]
    assert draw_drops(uniform, TABLE).tolist() == expected


def test_codes_come_by_their_shares() -> None:
    codes = draw_drops(torch.rand(100_000, generator=torch.Generator().manual_seed(0)), TABLE)
    for kind in Drop:
        assert (codes == kind).float().mean().item() == pytest.approx(TABLE.get(kind, 0.8), abs=0.003)


def test_an_empty_table_drops_nothing() -> None:
    assert (draw_drops(torch.rand(10), {}) == Drop.NOTHING).all()


@pytest.mark.parametrize("table", [{Drop.ALL: -0.1}, {Drop.ALL: 0.6, Drop.TEXT: 0.6}])
def test_shares_that_are_no_shares_are_refused(table) -> None:
    with pytest.raises(ValueError, match="must be at least 0 and sum to at most 1"):
        draw_drops(torch.rand(10), table)
