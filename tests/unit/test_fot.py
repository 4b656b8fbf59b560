"""FOT: worked by hand, what it protects and how much of it, from sketches and from Grams."""

from __future__ import annotations

import pytest
import torch
from rule_contract import Arrival, Fold, RuleContract, gaussian
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense
from fedmerge.server.merge import make_rule
from fedmerge.server.merge.fot import Fot, FotGram, Orthogonal
from fedmerge.server.merge.protected import Protected
from fedmerge.server.merge.rule import Context, tensors_of

SEED = 91
BIAS = LayerSpec("bias", (4,), torch.float32, LayerKind.VECTOR)


def matrix(rows: int, columns: int) -> LayerSpec:
    return LayerSpec("weight", (rows, columns), torch.float32, LayerKind.MATRIX)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(seed: int, columns: int, rows: int = 60, decay: float = 1.0) -> Tensor:
    """A (N, rows): inputs whose energy falls off over directions of their own."""
    turn = torch.linalg.qr(drawn(seed, columns, columns)).Q
    return turn * torch.logspace(0, -decay, columns, dtype=torch.float64) @ drawn(seed + 1, columns, rows)


def told(**statistics: Tensor) -> Context:
    return Context(statistics={n: s.float() for n, s in statistics.items()}, step=True)


def sketch_of(rows_NR: Tensor, seed: int, width: int, basis_NK: Tensor | None = None) -> Context:
    """What a site tells of its inputs, outside of a basis if it was shown one."""
    rest = rows_NR if basis_NK is None else rows_NR - basis_NK @ (basis_NK.T @ rows_NR)
    mixed = rest @ drawn(seed, rows_NR.shape[1], width)
    return told(sketch=mixed, residual=(rest.norm() / rows_NR.norm()).reshape(1))


def gram_of(rows_NR: Tensor) -> Context:
    """The Gram of the same inputs, as a factor."""
    return told(input_gram=torch.linalg.qr(rows_NR.T / rows_NR.shape[1] ** 0.5, mode="r").R)


def basis_of(rule: Orthogonal, state) -> Tensor:
    shown = rule.shown(state)
    return torch.zeros(len(state.basis_NB), 0).double() if shown is None else shown.double()


def after(rule: Orthogonal, state, context: Context):
    """The state after a round that moves nothing but tells something."""
    return rule.absorb(state, None, Dense(torch.zeros(state.merged_MN.shape)), context)


def overlap(one_NK: Tensor, other_NK: Tensor) -> float:
    """Mean squared cosine of the angles between two subspaces, 1 where the smaller lies in the other."""
    cosines = torch.linalg.svdvals(one_NK.T @ other_NK)
    return float(cosines.square().mean())


# --- against a reference ---


class Published:
    """The published steps in float64, with a QR of old and new directions together."""

    def layer_reference(self, rule, layer, vectors, contexts):
        if layer.kind is LayerKind.VECTOR:
            return vectors[-1]
        columns = layer.matrix_shape[1]
        merged, basis = torch.zeros_like(vectors[0]), torch.zeros(columns, 0, dtype=torch.float64)
        eps = rule.eps
        for vector, context in zip(vectors, contexts, strict=True):
            step = vector - merged
            merged = merged + step - step @ basis @ basis.T
            basis = extended(basis, *self.told_of(rule, context), eps, rule.squared)
            eps += rule.eps_inc
        return merged


def extended(basis: Tensor, seen: Tensor, sent: float, eps: float, squared: bool) -> Tensor:
    rest = seen - basis @ (basis.T @ seen)
    if rest.norm() < 1e-5 * seen.norm():
        return basis
    ratio = sent * float(rest.norm() / seen.norm()) ** (2 if squared else 1)
    wanted = (ratio - (1 - eps)) / ratio
    left, values, _ = torch.linalg.svd(rest, full_matrices=False)
    energy, kept = values.square() / values.square().sum(), 1
    while kept < int((values > 1e-5 * seen.norm()).sum()) and not float(energy[:kept].sum()) > wanted:
        kept += 1
    return torch.linalg.qr(torch.cat([basis, left[:, :kept]], dim=1)).Q


class TestFot(Published, RuleContract):
    rules = (Fot(), Fot(eps=0.5, eps_inc=0.02), Fot(eps=0.8, squared=True))

    def told_of(self, rule, context):
        return context.statistics["sketch"].double(), float(context.statistics["residual"])


class TestFotGram(Published, RuleContract):
    rules = (FotGram(eps=0.5), FotGram(eps=0.3, eps_inc=0.1), FotGram(eps=0.6, squared=True))

    def told_of(self, rule, context):
        return context.statistics["input_gram"].double().T, 1.0


class TestWorkedByHand:
    """Three inputs of a layer, with energies 16, 4 and 1 along the axes: a sketch is diag(4, 2, 1).

    For eps = 0.9 and all of the inputs new, r = 1 and eps' = 0.9: the first axis has 16/21 = 0.762, the
    first two 20/21 = 0.952. Of eps = 0.7 the first is enough.
    """

    sketch = torch.diag(torch.tensor([4.0, 2.0, 1.0]))

    @pytest.mark.parametrize(("eps", "kept"), [(0.7, 1), (0.9, 2), (0.96, 3), (1.0, 3)])
    def test_as_many_directions_as_it_takes(self, eps: float, kept: int) -> None:
        rule = Fot(eps=eps)
        state = after(rule, rule.init(matrix(1, 3)), told(sketch=self.sketch, residual=torch.ones(1)))
        torch.testing.assert_close(rule.shown(state).abs(), torch.eye(3)[:, :kept])
        assert state.tasks.tolist() == [1.0]

    def test_a_step_loses_its_part_along_them(self) -> None:
        rule = Fot(eps=0.7)
        state = after(rule, rule.init(matrix(2, 3)), told(sketch=self.sketch, residual=torch.ones(1)))
        step = Dense(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        moved = rule.absorb(state, None, step, Context(step=True))
        torch.testing.assert_close(moved.merged_MN, torch.tensor([[0.0, 2.0, 3.0], [0.0, 5.0, 6.0]]))
        again = rule.absorb(moved, None, Dense(torch.ones(2, 3)), Context())  # from the base
        torch.testing.assert_close(again.merged_MN, torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]))

    @pytest.mark.parametrize(("squared", "residual", "kept"), [(False, 0.4, 2), (True, 0.16, 1)])
    def test_squared_ratios_protect_fewer(self, squared: bool, residual: float, kept: int) -> None:
        """For r = 0.4 and eps = 0.95, eps' is 0.35 / 0.4 = 0.875; of squares, it is 0.11 / 0.16 = 0.6875."""
        rule = Fot(eps=0.95, squared=squared)
        state = rule.init(matrix(1, 3))
        state = after(rule, state, told(sketch=self.sketch, residual=torch.tensor([residual])))
        assert basis_of(rule, state).shape[1] == kept

    def test_what_is_protected_already_counts(self) -> None:
        """A second task with the Gram diag(16, 4, 1): the first axis is protected, r = sqrt(5 / 21) = 0.488.

        For eps = 0.8, eps' = 0.59, and the second axis has 4/5 of the residual.
        """
        for rule, second in ((FotGram(eps=0.8), "gram"), (Fot(eps=0.8), "residual"), (Fot(eps=0.8), "whole")):
            first = torch.diag(torch.tensor([1.0, 0.0, 0.0]))
            context = {
                "gram": told(input_gram=self.sketch),
                "residual": told(
                    sketch=torch.diag(torch.tensor([0.0, 2.0, 1.0])),
                    residual=torch.tensor([(5 / 21) ** 0.5]),
                ),
                "whole": told(sketch=self.sketch, residual=torch.ones(1)),
            }[second]
            before = (
                told(input_gram=first) if second == "gram" else told(sketch=first, residual=torch.ones(1))
            )
            state = after(rule, after(rule, rule.init(matrix(1, 3)), before), context)
            torch.testing.assert_close(rule.shown(state).abs(), torch.eye(3)[:, :2])
            share = 4 / 21
            assert state.energy_B[1].item() == pytest.approx(share)


@pytest.mark.parametrize("residual", [0.05, 1e-30])
def test_an_eps_that_is_reached_already_still_adds_one_direction(residual: float) -> None:
    rule = Fot(eps=0.9)
    state = rule.init(matrix(1, 5))
    for tasks in (1, 2):
        context = told(sketch=drawn(tasks, 5, 5), residual=torch.tensor([residual]))  # eps' <= -1
        state = after(rule, state, context)
        assert basis_of(rule, state).shape[1] == tasks


@pytest.mark.parametrize("residual", [0.0, 1.0])
def test_inputs_within_what_is_protected_add_none(residual: float) -> None:
    rule = Fot()
    first = drawn(SEED, 8, 2)
    state = after(rule, rule.init(matrix(1, 8)), told(sketch=first, residual=torch.ones(1)))
    basis = basis_of(rule, state)
    assert basis.shape[1] == 2
    within = told(sketch=first @ drawn(SEED + 1, 2, 8), residual=torch.tensor([residual]))
    assert torch.equal(basis_of(rule, after(rule, state, within)), basis)
    zeros = told(sketch=torch.zeros(8, 8), residual=torch.tensor([residual]))
    assert torch.equal(basis_of(rule, after(rule, state, zeros)), basis)


def test_a_residual_of_nothing_adds_none_whatever_its_sketch() -> None:
    rule = Fot()
    state = after(rule, rule.init(matrix(1, 5)), told(sketch=drawn(SEED, 5, 5), residual=torch.zeros(1)))
    assert rule.shown(state) is None


def test_directions_of_a_small_residual_are_orthogonal_to_those_that_were_there() -> None:
    rule, old, new = Fot(eps=1.0), drawn(SEED, 30, 10), drawn(SEED + 1, 30, 5)
    state = after(rule, rule.init(matrix(1, 30)), told(sketch=old, residual=torch.ones(1)))
    whole = old @ drawn(SEED + 2, 10, 30) + 1e-4 * new @ drawn(SEED + 3, 5, 30)
    basis = basis_of(rule, after(rule, state, told(sketch=whole, residual=torch.ones(1))))
    assert basis.shape[1] == 15
    assert float((basis.T @ basis - torch.eye(15)).abs().max()) < 1e-6


def test_eps_grows_with_the_tasks_and_not_with_the_rounds() -> None:
    rule = Fot(eps=0.7, eps_inc=0.1)
    states = [rule.init(matrix(1, 3))]
    for rounds in (1, 3):
        state = after(rule, states[0], told(sketch=torch.zeros(3, 3), residual=torch.zeros(1)))
        for _ in range(rounds):
            state = after(rule, state, Context(step=True))
        sketch = told(sketch=torch.diag(torch.tensor([4.0, 2.0, 1.0])), residual=torch.ones(1))
        states.append(after(rule, state, sketch))
        assert states[-1].tasks.tolist() == [2.0]
        assert basis_of(rule, states[-1]).shape[1] == 2  # eps' = 0.8 now; 0.7 would have one


def test_a_round_that_tells_nothing_keeps_the_directions_bit_for_bit() -> None:
    rule = Fot()
    state = after(rule, rule.init(matrix(2, 6)), sketch_of(inputs(SEED, 6), 1, 6))
    again = rule.absorb(state, None, Dense(torch.ones(2, 6)), Context(step=True))
    for field in ("basis_NB", "energy_B", "tasks"):
        assert torch.equal(getattr(again, field), getattr(state, field))


def test_nothing_is_shown_before_the_first_task_and_of_vector_layers() -> None:
    rule = Fot()
    assert rule.shown(rule.init(matrix(2, 3))) is None
    assert rule.shown(rule.init(BIAS)) is None
    assert FotGram().asks() is None
    assert make_rule("fot", {"width": 0.5, "distribution": "uniform", "squared": True}).asks().columns(7) == 4


def test_vector_layers_take_every_step_whole() -> None:
    rule = Fot()
    state = rule.init(BIAS)
    for _ in range(3):
        state = rule.absorb(state, None, Dense(torch.ones(4)), Context(step=True))
    assert rule.read(state, Fold(rule, []).totals).tolist() == [[3.0] * 4]


# --- laws ---


@pytest.mark.parametrize("rule", [FotGram(), FotGram(squared=True), FotGram(eps=0.8)], ids=repr)
def test_at_most_the_share_that_is_not_protected_of_every_tasks_inputs_is_left_open(rule) -> None:
    """So a step of norm 1 changes what the layer makes of them by at most its root of their norm."""
    state, seen = rule.init(matrix(10, 24)), []
    for task in range(4):
        seen.append(inputs(SEED + 10 * task, 24, decay=2.0))
        before = state.merged_MN.double()
        step = drawn(task, 10, 24).float()
        state = rule.absorb(state, None, Dense(step), gram_of(seen[-1]))
        changed = state.merged_MN.double() - before
        for rows in seen[:-1]:
            bound = (1 - rule.eps) ** 0.5 * torch.linalg.matrix_norm(step.double(), 2) * rows.norm()
            assert (changed @ rows).norm() < bound
        basis = basis_of(rule, state)
        for rows in seen:
            assert (rows - basis @ (basis.T @ rows)).norm() ** 2 <= (1 - rule.eps + 1e-6) * rows.norm() ** 2
        assert basis.shape[1] < 24


def test_squared_ratios_protect_no_more_directions_than_others() -> None:
    ranks = []
    for squared in (False, True):
        rule = FotGram(squared=squared)
        state = rule.init(matrix(2, 24))
        for task in range(4):
            state = after(rule, state, gram_of(inputs(SEED + 10 * task, 24, decay=2.0)))
        ranks.append(basis_of(rule, state).shape[1])
    assert ranks[1] < ranks[0]


def test_projecting_a_projected_step_changes_nothing() -> None:
    rule = Fot()
    state = after(rule, rule.init(matrix(5, 12)), sketch_of(inputs(SEED, 12), 1, 12))
    once = state.outside(drawn(2, 5, 12).float())
    torch.testing.assert_close(state.outside(once), once, rtol=0, atol=1e-6)
    assert float((once @ state.basis_NK).abs().max()) < 1e-6


@pytest.mark.parametrize("rule", [Fot(eps=0.7), Fot(eps=0.7, budget=0.25)], ids=repr)
def test_directions_stay_orthonormal_over_50_extensions(rule) -> None:
    state = rule.init(matrix(2, 120))
    for task in range(50):
        rows = inputs(SEED + 3 * task, 120, decay=3.0)
        state = after(rule, state, sketch_of(rows, task, 120, basis_of(rule, state)))
        basis = basis_of(rule, state)
        assert float((basis.T @ basis - torch.eye(basis.shape[1])).abs().max()) < 1e-6
    assert basis.shape[1] == (30 if rule.budget < 1 else 120)


def test_directions_that_are_there_stay_where_they_are() -> None:
    rule, state = Fot(eps=0.6), Fot().init(matrix(2, 40))
    for task in range(4):
        before = basis_of(rule, state)
        state = after(rule, state, sketch_of(inputs(SEED + 5 * task, 40), task, 40, before))
        assert torch.equal(basis_of(rule, state)[:, : before.shape[1]], before)


def test_a_full_layer_moves_no_more() -> None:
    rule = Fot(eps=1.0)
    state = after(rule, rule.init(matrix(3, 6)), told(sketch=drawn(SEED, 6, 6), residual=torch.ones(1)))
    state = after(rule, state, told(sketch=drawn(SEED + 1, 6, 6), residual=torch.ones(1)))
    moved = rule.absorb(state, None, Dense(torch.ones(3, 6)), Context(step=True))
    assert float(moved.merged_MN.abs().max()) < 1e-6


def test_a_budget_keeps_the_directions_of_the_most_energy() -> None:
    rule = FotGram(eps=1.0, budget=0.5)
    state = rule.init(matrix(1, 4))
    # Shares of input energy by axis: of the second task 0.3, 0.2 and 0.5, of the third 0.1, 0.4 and 0.5.
    for energies, kept, shares in (
        ([9.0, 1.0, 0.0, 0.0], [0, 1], [0.9, 0.1]),
        ([0.0, 3.0, 2.0, 5.0], [0, 3], [0.9, 0.5]),
    ):
        state = after(rule, state, told(input_gram=torch.tensor(energies).sqrt().diag()))
        torch.testing.assert_close(rule.shown(state).abs(), torch.eye(4)[:, kept])
        torch.testing.assert_close(state.energy_B, torch.tensor(shares))
    state = after(rule, state, told(input_gram=torch.tensor([1.0, 4.0, 0.0, 5.0]).sqrt().diag()))
    torch.testing.assert_close(rule.shown(state).abs(), torch.eye(4)[:, [0, 3]])
    torch.testing.assert_close(state.energy_B, torch.tensor([1.0, 1.0]))
    assert sum(t.nbytes for t in tensors_of(state).values()) == 4 * (4 + 2 * 4 + 2 + 1)


def test_a_budget_below_one_direction_is_one() -> None:
    assert Fot(budget=0.01).init(matrix(2, 9)).basis_NB.shape == (9, 1)


# --- sketches and Grams of the same inputs ---


@pytest.mark.parametrize("rows", [30, 400])
def test_wide_sketches_find_the_directions_that_the_gram_has(rows: int) -> None:
    seen = [inputs(SEED + 10 * task, 32, rows, decay=1.5) for task in range(2)]
    sketched, exact = Fot(eps=0.9), FotGram(eps=0.9)
    one, other = sketched.init(matrix(2, 32)), exact.init(matrix(2, 32))
    for task, rows_NR in enumerate(seen):
        one = after(sketched, one, sketch_of(rows_NR, task, 32 * 200, basis_of(sketched, one)))
        other = after(exact, other, gram_of(rows_NR))
        a, b = basis_of(sketched, one), basis_of(exact, other)
        assert abs(a.shape[1] - b.shape[1]) <= 1
        assert overlap(a, b) > 0.99


def test_sketches_of_whole_inputs_give_the_directions_that_residual_ones_give() -> None:
    rule = Fot(eps=0.85)
    start = after(rule, rule.init(matrix(2, 20)), sketch_of(inputs(SEED, 20, decay=2.0), 3, 500))
    rows = inputs(SEED + 1, 20, decay=2.0)
    shown = after(rule, start, sketch_of(rows, 5, 2000, basis_of(rule, start)))
    hidden = after(rule, start, sketch_of(rows, 5, 2000))
    a, b = basis_of(rule, shown), basis_of(rule, hidden)
    assert a.shape == b.shape
    assert overlap(a, b) > 1 - 1e-6


def test_order_of_sites_and_how_rows_are_dealt_do_not_matter() -> None:
    """Sketches are sums of terms per row; who holds a row changes nothing but the order of adding."""
    rows, mixing = inputs(SEED, 16, 60), drawn(SEED, 60, 16)
    rule, bases = Fot(), []
    for order in (range(60), reversed(range(60))):
        chosen = list(order)
        parts = [chosen[:10], chosen[10:35], chosen[35:]]
        sketch = sum((rows[:, part] @ mixing[part]).float() for part in parts)
        bases.append(
            basis_of(rule, after(rule, rule.init(matrix(2, 16)), told(sketch=sketch, residual=torch.ones(1))))
        )
    assert bases[0].shape == bases[1].shape
    assert overlap(*bases) > 1 - 1e-6


def test_forgetting_of_a_linear_layer_is_cut_where_tasks_look_elsewhere() -> None:
    """Two tasks of 8 inputs each, learned by gradient steps: the first stays, and the second is learned."""
    kinds = {"fedavg": make_rule("fedavg"), "fot": FotGram(eps=0.999)}
    tasks = [(inputs(SEED + 7 * t, 24, 8), drawn(t, 3, 8)) for t in range(2)]
    lost = {}
    for name, rule in kinds.items():
        fold, errors = Fold(rule, [matrix(3, 24)]), []
        for place, (rows, wanted) in enumerate(tasks):
            for _ in range(200):
                merged = fold.read()["weight"].double()
                step = 0.05 * (wanted - merged @ rows) @ rows.T
                arrival = Told({"weight": Dense(step.float())}, step=True)
                fold.merge(arrival)
            arrival = Told({"weight": Dense(torch.zeros(3, 24))}, step=True)
            arrival.told = gram_of(rows)
            fold.merge(arrival)
            merged = fold.read()["weight"].double()
            errors.append([float((y - merged @ x).norm()) for x, y in tasks[: place + 1]])
        lost[name] = errors[1][0] - errors[0][0]
        assert errors[1][1] < 0.4 * tasks[1][1].norm()
    assert lost["fot"] < 0.1 * lost["fedavg"]


class Told(Arrival):
    """An arrival that tells what it is given to tell."""

    told: Context | None = None

    def context(self, rule, layer, merges, measured=None):
        return Context(merges, self.told.statistics if self.told else {}, step=self.step)


def test_the_first_rounds_of_a_task_are_those_of_federated_averaging() -> None:
    layers = [matrix(4, 6), BIAS]
    steps = [Told(gaussian(seed, layers), step=True) for seed in range(3)]
    one, two = (Fold(rule, layers).merge(*steps).read() for rule in (Fot(), make_rule("fedavg")))
    for name, merged in one.items():
        torch.testing.assert_close(merged, two[name])


@pytest.mark.parametrize("option", [{"eps": 0.0}, {"budget": 0.0}, {"budget": 1.1}, {"width": 9.0}])
def test_options_out_of_range_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        Fot(**option)


def test_a_state_has_the_size_it_will_have_from_the_start() -> None:
    state = Fot().init(matrix(3, 5))
    assert isinstance(state, Protected)
    assert {name: tuple(t.shape) for name, t in tensors_of(state).items()} == {
        "merged_MN": (3, 5),
        "basis_NB": (5, 5),
        "energy_B": (5,),
        "tasks": (1,),
    }
