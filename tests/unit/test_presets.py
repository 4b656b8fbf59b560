"""Does a method's name stand for what it should, and does a command line say which methods run?"""

from __future__ import annotations

import pytest

from fedmerge.common.errors import ConfigError
from fedmerge.common.training import PLAIN, Correction, LocalTraining
from fedmerge.deploy.choices import DEFAULT_RULES, parse_methods
from fedmerge.server.layout import FederationConfig
from fedmerge.server.merge import RULES
from fedmerge.server.methods import PRESETS, Method, check_owners, grouped, make_method, owners

SHARED = FederationConfig(rounds=4, sites_per_task=6, sites_per_round=3)


def names(groups: list[list[Method]]) -> list[list[str]]:
    return [[method.name for method in group] for group in groups]


class TestMethods:
    @pytest.mark.parametrize("name", RULES.keys() - PRESETS.keys())
    def test_a_rule_is_a_method_that_starts_from_the_base_and_trains_plainly(self, name: str) -> None:
        method = make_method(name)
        assert (method.rule, method.start, method.training) == (RULES[name](), "base", PLAIN)
        assert method.laid_out(SHARED) == SHARED

    @pytest.mark.parametrize("name", PRESETS)
    def test_every_preset_can_be_made_and_names_a_rule(self, name: str) -> None:
        method = make_method(name)
        assert method.name == name
        assert method.rule.name == PRESETS[name].rule

    @pytest.mark.parametrize(
        ("name", "wanted"),
        [
            ("fot", {"start": "merged", "weights": "uniform"}),
            ("fedavg", {"start": "merged", "weights": "examples"}),
            ("fedprox", {"start": "merged", "training": LocalTraining.chosen(["prox"])}),
            ("pm", {"start": "merged", "training": LocalTraining.chosen(["perturb"])}),
            ("pm_plain", {"start": "merged", "training": PLAIN, "correction": None}),
            (
                "holistic",
                {
                    "start": "merged",
                    "training": LocalTraining.chosen(["tangent"]),
                    "correction": Correction(),
                },
            ),
        ],
    )
    def test_a_preset_becomes_a_layout(self, name: str, wanted: dict[str, object]) -> None:
        layout = make_method(name).laid_out(SHARED)
        assert {key: getattr(layout, key) for key in wanted} == wanted
        assert (layout.rounds, layout.sites_per_task, layout.sites_per_round) == (4, 6, 3)

    def test_settings_go_to_rule_option_loop_and_correction(self) -> None:
        settings = {
            "holistic": {"share": 0.3},
            "loop": {"epochs": 2},
            "correction": {"epochs": 3},
            "lora": {"rank": 4},
        }
        method = make_method("holistic", settings, compress="int8")
        assert method.rule.model_dump() == {"share": 0.3}
        assert (method.training.loop.epochs, method.training.lora) == (2, None)
        assert method.correction == Correction(epochs=3)
        assert method.laid_out(SHARED).compress == "int8"

    def test_training_options_come_on_top_of_the_methods_own(self) -> None:
        method = make_method("pm", {"lora": {"rank": 4}}, train=("lora", "perturb"))
        assert method.training.options == ("lora", "perturb")

    @pytest.mark.parametrize(
        ("name", "settings", "train", "said"),
        [
            ("fott", {}, (), "unknown method: got fott"),
            ("opcm", {}, ("lorra",), "unknown training option: got lorra"),
            ("opcm", {"opcm": {"alfa": 1}}, (), "alfa"),
            ("opcm", {"lora": {"rank": 0}}, ("lora",), "setting 'lora.rank'"),
            ("opcm", {"loop": {"optimizer": "adam"}}, (), "setting 'loop.optimizer'"),
            ("holistic", {"correction": {"loss": "l3"}}, (), "setting 'loss'"),
            ("holistic", {}, ("lora",), "tangent trains whole weights and lora does not"),
        ],
    )
    def test_what_is_wrong_is_named(
        self, name: str, settings: dict[str, dict[str, object]], train: tuple[str, ...], said: str
    ) -> None:
        with pytest.raises(ConfigError, match=said):
            make_method(name, settings, train)


class TestAlone:
    @pytest.mark.parametrize(
        ("rounds", "sites", "asked", "passes"),
        [
            (1, 1, None, 1),
            (4, 6, None, 4),
            (4, 6, 3, 2),
            (5, 6, 3, 3),
            (1, 125, 64, 1),
            (200, 125, 64, 103),
            (3, 2, 9, 3),
        ],
    )
    def test_one_site_passes_over_the_data_as_often_as_all_would_together(
        self, rounds: int, sites: int, asked: int | None, passes: int
    ) -> None:
        layout = FederationConfig(rounds=rounds, sites_per_task=sites, sites_per_round=asked)
        found = make_method("sequential").laid_out(layout)
        assert (found.sites_per_task, found.sites_per_round, found.rounds) == (1, None, passes)
        assert found.start == "merged"

    def test_joint_learns_all_tasks_from_the_base(self) -> None:
        found = make_method("joint").laid_out(SHARED)
        assert (found.joint, found.start, found.sites_per_task, found.rounds) == (True, "base", 1, 2)


class TestGroups:
    def test_plain_rules_share_their_vectors_and_all_else_runs_by_itself(self) -> None:
        methods = [make_method(name) for name in ("opcm", "fedavg", "average", "joint", "fot", "ties")]
        assert names(grouped(methods)) == [["opcm", "average", "ties"], ["fedavg"], ["joint"], ["fot"]]

    def test_other_training_or_compression_makes_other_vectors(self) -> None:
        methods = [
            make_method("opcm"),
            make_method("average", train=("lora",)),
            make_method("ties", {"lora": {"rank": 4}}, train=("lora",)),
            make_method("wudi", {"loop": {"epochs": 2}}),
            make_method("dop", compress="int8"),
            make_method("svc", train=("lora",)),
        ]
        found = names(grouped(methods))
        assert found == [["opcm"], ["average", "svc"], ["ties"], ["wudi"], ["dop"]]


class TestOwners:
    def test_a_method_heeds_its_rule_its_options_and_the_loop(self) -> None:
        assert owners(make_method("opcm")) == {"opcm", "loop"}
        assert owners(make_method("fedprox", train=("lora",))) == {"fedavg", "loop", "prox", "lora"}
        assert owners(make_method("holistic")) == {"holistic", "loop", "tangent", "correction"}

    def test_options_that_one_of_the_methods_heeds_pass(self) -> None:
        check_owners({"prox": {"mu": 0.1}, "opcm": {}}, [make_method("opcm"), make_method("fedprox")])

    def test_options_that_nothing_heeds_are_refused_with_a_hint(self) -> None:
        with pytest.raises(ConfigError, match=r"got lora\.rank, wanted loop.*train = 'lora'"):
            check_owners({"lora": {"rank": 4}}, [make_method("opcm")])
        with pytest.raises(ConfigError, match=r"got fot\.eps") as refusal:
            check_owners({"fot": {"eps": 0.9}}, [make_method("opcm")])
        assert "train =" not in str(refusal.value)


class TestCommandLine:
    """``parse_methods``: --rule, --method, --train, --compress, --set."""

    def test_nothing_named_compares_a_few_rules(self) -> None:
        methods, privacy = parse_methods(None, "", "", "none", [])
        assert [method.name for method in methods] == DEFAULT_RULES.split(",")
        assert privacy is None

    def test_methods_take_the_place_of_the_default_rules_and_follow_named_ones(self) -> None:
        methods, _ = parse_methods(None, "fot, fedavg", "", "none", [])
        assert [method.name for method in methods] == ["fot", "fedavg"]
        methods, _ = parse_methods("opcm", "fedavg,opcm", "", "none", [])
        assert [method.name for method in methods] == ["opcm", "fedavg"]

    def test_all_stands_for_every_rule(self) -> None:
        methods, _ = parse_methods("all", "", "", "none", [])
        assert [method.name for method in methods] == list(RULES)

    def test_one_way_to_compress_leaves_names_alone(self) -> None:
        (method,), _ = parse_methods("opcm", "", "", "int8", [])
        assert (method.name, method.compress) == ("opcm", "int8")

    def test_several_ways_to_compress_run_every_method_in_each(self) -> None:
        methods, _ = parse_methods(None, "opcm,fot", "", "none,lowrank:0.9+int8", [])
        assert [(method.name, method.compress) for method in methods] == [
            ("opcm+none", "none"),
            ("opcm+lowrank:0.9+int8", "lowrank:0.9+int8"),
            ("fot+none", "none"),
            ("fot+lowrank:0.9+int8", "lowrank:0.9+int8"),
        ]

    def test_settings_are_numbers_words_or_truth(self) -> None:
        settings = ["lora.rank=4", "loop.optimizer=sgd", "fot.squared=true", "lora.targets=*.query.weight"]
        (method,), _ = parse_methods(None, "fot", "lora", "none", settings)
        assert method.training.lora is not None
        assert (method.training.lora.rank, method.training.lora.targets) == (4, "*.query.weight")
        assert method.training.loop.optimizer == "sgd"
        assert method.rule.model_dump()["squared"] is True

    def test_the_owner_may_be_left_out_where_there_is_one_name(self) -> None:
        (method,), _ = parse_methods("opcm", "", "", "none", ["alpha=0.4"])
        assert method.rule.model_dump()["alpha"] == 0.4

    def test_privacy_is_the_sites_and_no_methods(self) -> None:
        _, privacy = parse_methods("opcm", "", "", "none", ["privacy.clip=1", "privacy.noise=0.5"])
        assert privacy == {"clip": 1, "noise": 0.5}

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("", "", "", "none", []), "name at least one rule or method"),
            ((None, "fott", "", "none", []), "unknown method: got fott"),
            (("opcm", "", "", "int4", []), "an unknown compression: got 'int4'"),
            (("opcm", "", "", "none", ["lora.rank=4"]), "Add it with train = 'lora'"),
            (("opcm", "fot", "", "none", ["alpha=0.4"]), "not a setting: got 'alpha=0.4'"),
            (("opcm", "", "", "none", ["opcm.alpha"]), "not a setting: got 'opcm.alpha'"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(
        self, arguments: tuple[str | None, str, str, str, list[str]], said: str
    ) -> None:
        with pytest.raises(ConfigError, match=said):
            parse_methods(*arguments)
