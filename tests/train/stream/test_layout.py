"""Sample numbers, processes and workers."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data_pipeline.errors import UserError
from train.stream import Layout


class WhoReads(Dataset[tuple[int, int]]):
    """Item n: n and the worker that was asked for it."""

    def __getitem__(self, number: int) -> tuple[int, int]:
        worker = get_worker_info()
        assert worker is not None
        return number, worker.id


def test_two_processes_with_two_workers_take_turns() -> None:
    layout = Layout(processes=2, workers=2, batch_size=2)
    # pass 0: process 0 takes 0 1, process 1 takes 2 3; pass 1 goes to the second workers; pass 2 to the first again
    slots = [layout.place(n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)]
    assert slots == [(0, 0), (0, 1), (2, 0), (2, 1), (1, 0), (1, 1), (3, 0), (3, 1), (0, 2), (0, 3)]
    assert layout.slots == 4 and Layout(3, 0, 1).slots == 3


@pytest.mark.parametrize("layout", [Layout(), Layout(1, 0, 4), Layout(2, 3, 5), Layout(3, 1, 2)])
def test_slots_and_positions_are_another_way_to_write_the_number(layout: Layout) -> None:
    places = [layout.place(n) for n in range(300)]
    assert len(set(places)) == 300
    assert [layout.number(*place) for place in places] == list(range(300))
    for passes in (0, 1, 2, 7, 10):
        taken = [0] * layout.slots
        for number in range(passes * layout.samples_a_pass):
            taken[layout.place(number)[0]] += 1
        assert taken == [layout.taken(slot, passes) for slot in range(layout.slots)]


@pytest.mark.parametrize("first_pass", [0, 3])
def test_a_loader_gives_all_passes_of_a_slot_to_one_worker(first_pass: int) -> None:
    layout = Layout(processes=1, workers=2, batch_size=2)
    batches = [list(range(p * 2, p * 2 + 2)) for p in range(first_pass, first_pass + 7)]
    workers: dict[int, set[int]] = {}
    for numbers, ids in DataLoader(WhoReads(), batch_sampler=batches, num_workers=2):  # type: ignore[arg-type]
        for number, worker in zip(numbers.tolist(), ids.tolist(), strict=True):
            workers.setdefault(layout.place(number)[0], set()).add(worker)
    assert sorted(workers) == [0, 1] and all(len(ids) == 1 for ids in workers.values())


def test_a_layout_without_processes_is_refused() -> None:
    with pytest.raises(UserError, match="at least one process"):
        Layout(processes=0)
