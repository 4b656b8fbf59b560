"""What the numbers over an accuracy matrix mean, against matrices worked by hand."""

from __future__ import annotations

import pytest

from fedmerge.common.errors import MismatchError
from fedmerge.deploy.report import metrics

# Three tasks, three merges. Task 0 falls 0.9 -> 0.7 -> 0.6; task 1 rises 0.8 -> 0.85 at the last merge.
BY_HAND = [
    [0.90, 0.30, 0.20],
    [0.70, 0.80, 0.25],
    [0.60, 0.85, 0.95],
]


class TestByHand:
    def test_average_accuracy_is_the_mean_of_the_last_row(self) -> None:
        assert metrics.average_accuracy(BY_HAND) == pytest.approx((0.60 + 0.85 + 0.95) / 3)

    def test_accuracy_so_far_counts_only_tasks_already_merged(self) -> None:
        assert metrics.accuracy_so_far(BY_HAND) == pytest.approx([0.90, 0.75, 0.80])

    def test_backward_transfer_is_the_change_since_the_own_merge(self) -> None:
        assert metrics.backward_transfer_by_task(BY_HAND) == [pytest.approx(-0.30), pytest.approx(0.05), None]
        assert metrics.backward_transfer(BY_HAND) == pytest.approx((-0.30 + 0.05) / 2)

    def test_forgetting_is_the_loss_since_the_best_before_the_last_merge(self) -> None:
        assert metrics.forgetting_by_task(BY_HAND) == [pytest.approx(0.30), pytest.approx(-0.05), None]
        assert metrics.forgetting(BY_HAND) == pytest.approx((0.30 - 0.05) / 2)

    def test_forgetting_looks_at_the_best_and_not_at_the_own_merge(self) -> None:
        matrix = [[0.5, 0.0, 0.0], [0.9, 0.8, 0.0], [0.6, 0.8, 0.7]]
        assert metrics.forgetting(matrix) == pytest.approx((0.3 + 0.0) / 2)
        assert metrics.backward_transfer(matrix) == pytest.approx((0.1 + 0.0) / 2)

    def test_what_the_base_knew_before_the_own_merge_is_no_loss(self) -> None:
        matrix = [[0.5, 0.99, 0.0], [0.5, 0.80, 0.0], [0.5, 0.80, 0.7]]
        assert metrics.forgetting_by_task(matrix)[1] == pytest.approx(0.0)

    def test_nothing_is_left_out(self) -> None:
        assert metrics.left_out(BY_HAND) == (0, 0, 0)


class TestFewTasks:
    def test_one_task_has_accuracy_but_no_old_task(self) -> None:
        assert metrics.average_accuracy([[0.8]]) == 0.8
        assert metrics.accuracy_so_far([[0.8]]) == [0.8]
        assert metrics.backward_transfer([[0.8]]) is None
        assert metrics.forgetting([[0.8]]) is None
        assert metrics.left_out([[0.8]]) == (0, 0, 0)

    def test_no_merge_has_no_number(self) -> None:
        assert metrics.average_accuracy([]) is None
        assert metrics.accuracy_so_far([]) == []
        assert metrics.backward_transfer([]) is None
        assert metrics.forgetting([]) is None
        assert metrics.left_out([]) == (0, 0, 0)


class TestMissingEntries:
    def test_last_row_is_averaged_over_what_was_measured(self) -> None:
        matrix = [[0.9, None], [None, 0.8]]
        assert metrics.average_accuracy(matrix) == 0.8
        assert metrics.accuracy_so_far(matrix) == [0.9, 0.8]
        assert metrics.left_out(matrix) == (1, 1, 1)

    def test_old_task_without_its_own_merge_is_left_out_of_bwt_alone(self) -> None:
        matrix = [[None, 0.0, 0.0], [0.7, 0.8, 0.0], [0.6, 0.7, 0.9]]
        assert metrics.backward_transfer(matrix) == pytest.approx(-0.1)
        assert metrics.forgetting(matrix) == pytest.approx((0.1 + 0.1) / 2)
        assert metrics.left_out(matrix) == (0, 1, 0)

    def test_nothing_measured_gives_no_number(self) -> None:
        matrix = [[None, None], [None, None]]
        assert metrics.average_accuracy(matrix) is None
        assert metrics.accuracy_so_far(matrix) == [None, None]
        assert metrics.backward_transfer(matrix) is None
        assert metrics.left_out(matrix) == (2, 1, 1)


class TestOrderOfMerges:
    def test_learned_by_is_the_first_merge_of_a_task(self) -> None:
        assert metrics.learned_by(["a", "b", "c"], ["b", "a", "b"]) == [1, 0, None]

    def test_two_rounds_measure_from_the_first_merge_of_each_task(self) -> None:
        learned = metrics.learned_by(["a", "b"], ["a", "b", "a", "b"])
        matrix = [[0.5, 0.1], [0.4, 0.6], [0.7, 0.5], [0.6, 0.8]]
        assert metrics.accuracy_so_far(matrix, learned) == pytest.approx([0.5, 0.5, 0.6, 0.7])
        assert metrics.backward_transfer(matrix, learned) == pytest.approx((0.1 + 0.2) / 2)
        assert metrics.forgetting(matrix, learned) == pytest.approx((0.1 - 0.2) / 2)

    def test_a_task_never_merged_counts_in_acc_alone(self) -> None:
        matrix = [[0.9, 0.2, 0.3], [0.8, 0.7, 0.3]]
        assert metrics.average_accuracy(matrix) == pytest.approx(0.6)
        assert metrics.accuracy_so_far(matrix) == pytest.approx([0.9, 0.75])
        assert metrics.backward_transfer(matrix) == pytest.approx(-0.1)

    def test_more_merges_than_tasks_need_to_be_told_who_learned_what(self) -> None:
        with pytest.raises(MismatchError, match=r"more merges than tasks: got 2 merges, wanted at most 1"):
            metrics.forgetting([[0.5], [0.6]])

    def test_ragged_matrix_is_refused_with_the_merge(self) -> None:
        with pytest.raises(MismatchError, match=r"ragged at merge 2: got 1 entries, wanted 2"):
            metrics.backward_transfer([[0.5, 0.1], [0.6]])


class TestSamplingError:
    def test_one_task_is_the_binomial_standard_error(self) -> None:
        assert metrics.sampling_error([0.5], [100]) == pytest.approx(0.05)

    def test_it_shrinks_with_the_number_of_tasks(self) -> None:
        assert metrics.sampling_error([0.5] * 4, [100] * 4) == pytest.approx(0.025)

    def test_it_is_unknown_without_examples(self) -> None:
        assert metrics.sampling_error([0.5, 0.5], [100, 0]) is None
        assert metrics.sampling_error([None], [100]) is None
