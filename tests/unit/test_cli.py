"""Do the offline commands do what they say, and fail in one clear line with nothing written?"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from fedmerge import __version__
from fedmerge.common.base import Base
from fedmerge.common.errors import ConfigError
from fedmerge.common.taskvector import LowRank, TaskVector
from fedmerge.common.vectorfile import load
from fedmerge.deploy import choices, cli
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge import DEFAULT_RULE, RULES, make_rule

pytestmark = pytest.mark.filterwarnings("ignore")

BERT = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    num_labels=3,
)
LAYOUT = {
    "body.weight": ((24, 20), torch.float32),
    "body.bias": ((24,), torch.float32),
    "half.weight": ((6, 24), torch.float16),
    "brain.weight": ((6, 6), torch.bfloat16),
    "head.weight": ((3, 6), torch.float32),
    "steps": ((), torch.int64),
}


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.tensor(7) if dtype is torch.int64 else torch.randn(shape, generator=generator).to(dtype)
        for name, (shape, dtype) in LAYOUT.items()
    }


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the command in a folder of its own; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedmerge", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


@pytest.fixture
def files(run, tmp_path) -> Path:
    """A base and three fine-tuned checkpoints, a.safetensors to c.safetensors."""
    for seed, name in enumerate(("base", "a", "b", "c")):
        save_file(weights(seed), tmp_path / f"{name}.safetensors")
    return tmp_path


MERGE = ("merge", "--base", "base.safetensors", "--out", "out.safetensors")


def by_hand(order: str, rule: str = DEFAULT_RULE, **options) -> dict[str, torch.Tensor]:
    base = Base.from_checkpoint(weights(0))
    with LocalEngine(make_rule(rule, options), base.layers.values(), workers=1) as engine:
        for name in order:
            engine.merge(TaskVector.from_checkpoints(base, weights(" abc".index(name))))
        return dict(engine.merged().apply(base))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


def record(path: str = "out.json") -> dict:
    return json.loads(Path(path).read_text())


# --- rules and their settings ---


def test_rules_and_their_settings_are_parsed():
    opcm, average = choices.parse_rules(" opcm , average,opcm", ["opcm.alpha=0.25"])
    assert (opcm.name, opcm.alpha, average.name) == ("opcm", 0.25, "average")
    (alone,) = choices.parse_rules("opcm", ["alpha=0.75", "opcm.diagonal=cleared"], one=True)
    assert (alone.alpha, alone.diagonal) == (0.75, "cleared")


@pytest.mark.parametrize(
    ("names", "settings", "one", "says"),
    [
        ("", [], False, "name at least one rule: got ''"),
        (" , ", [], False, "name at least one rule"),
        ("opcm,average", [], True, "name one rule: got 'opcm,average'"),
        ("", [], True, "name one rule"),
        ("fedprox", [], False, f"no such merge rule: got 'fedprox', wanted {' or '.join(sorted(RULES))}"),
        ("opcm", ["alpha"], False, "not a setting of a chosen rule: got 'alpha', wanted opcm.OPTION=VALUE"),
        ("opcm", ["average.alpha=1"], False, "not a setting of a chosen rule"),
        ("opcm,average", ["alpha=1"], False, "wanted opcm.OPTION=VALUE or average.OPTION=VALUE"),
        ("opcm", ["alpha=2"], False, "rule 'opcm', option 'alpha'"),
        ("opcm", ["alpha=much"], False, "rule 'opcm', option 'alpha'"),
        ("opcm", ["alpha="], False, "rule 'opcm', option 'alpha'"),
        ("opcm", ["beta=1"], False, "rule 'opcm', option 'beta'"),
        ("average", ["alpha=1"], False, "This rule has no options"),
    ],
)
def test_wrong_rules_and_settings_are_refused_with_what_is_right(names, settings, one, says):
    with pytest.raises(ConfigError) as caught:
        choices.parse_rules(names, settings, one)
    assert says in str(caught.value)


# --- merge ---


def test_merged_weights_have_the_bases_names_shapes_and_dtypes(run, files):
    code, out, err = run(*MERGE, "a.safetensors", "b.safetensors")
    assert (code, err) == (0, "")
    assert f"{DEFAULT_RULE} over 2 inputs" in out
    merged = load_file("out.safetensors")
    assert {name: (tuple(t.shape), t.dtype) for name, t in merged.items()} == LAYOUT
    assert same(merged, by_hand("ab"))
    assert torch.equal(merged["steps"], torch.tensor(7))


@pytest.mark.parametrize("rule", ["opcm", "average", "task_arithmetic"])
def test_every_rule_merges_as_in_memory(run, files, rule):
    assert run(*MERGE, "--rule", rule, "a.safetensors", "b.safetensors", "c.safetensors")[0] == 0
    assert same(load_file("out.safetensors"), by_hand("abc", rule))


def test_the_order_of_inputs_matters_to_opcm_and_not_to_average(run, files):
    merged = {}
    for rule in ("opcm", "average"):
        for order in ("ab", "ba"):
            assert run(*MERGE, "--rule", rule, *(f"{name}.safetensors" for name in order))[0] == 0
            merged[rule, order] = load_file("out.safetensors")
    assert same(merged["opcm", "ba"], by_hand("ba", "opcm"))
    assert not same(merged["opcm", "ab"], merged["opcm", "ba"])
    assert same(merged["average", "ab"], merged["average", "ba"])


def test_a_rules_option_is_used_and_recorded(run, files):
    settings = ("--rule", "task_arithmetic", "--set", "factor=1.0")
    assert run(*MERGE, *settings, "a.safetensors")[0] == 0
    assert record()["options"] == {"factor": 1.0}
    assert torch.allclose(load_file("out.safetensors")["body.weight"], weights(1)["body.weight"], atol=1e-6)


def test_the_record_says_how_the_weights_came_about(run, files):
    assert run(*MERGE, "a.safetensors", "b.safetensors")[0] == 0
    found = record()
    assert (found["format"], found["rule"], found["base"]) == (
        "fedmerge.merge/1",
        DEFAULT_RULE,
        "base.safetensors",
    )
    assert found["base_fingerprint"] == Base.from_checkpoint(weights(0)).fingerprint
    assert set(found["options"]) == {"ridge", "side"}
    assert {kind: sorted(names) for kind, names in found["kinds"].items()} == {
        "matrix": ["body.weight", "brain.weight", "half.weight", "head.weight"],
        "vector": ["body.bias"],
        "private": [],
        "constant": ["steps"],
    }
    assert [row["version"]["number"] for row in found["inputs"]] == [1, 2]
    assert [(row["path"], row["kind"]) for row in found["inputs"]] == [
        ("a.safetensors", "checkpoint"),
        ("b.safetensors", "checkpoint"),
    ]
    assert [(row["changed"], row["low_rank"], row["unchanged"]) for row in found["inputs"]] == [
        (5, 0, [])
    ] * 2
    assert [row["left_out"] for row in found["inputs"]] == [["steps"], ["steps"]]
    assert found["lambda_t"] * found["scale"] == pytest.approx(1)
    assert found["inputs"][-1]["version"]["merged_norm"] == found["merged_norm"] > 0
    assert found["engine"]["kind"] == "LocalEngine"
    assert set(found["seconds"]) == {"merging", "writing"}
    assert found["versions"]["fedmerge"] == __version__


def test_private_layers_are_left_as_in_the_base(run, files):
    assert run(*MERGE, "--private", "head.*", "a.safetensors", "b.safetensors")[0] == 0
    merged = load_file("out.safetensors")
    assert torch.equal(merged["head.weight"], weights(0)["head.weight"])
    assert not torch.equal(merged["body.weight"], weights(0)["body.weight"])
    assert record()["kinds"]["private"] == ["head.weight"]


def test_a_private_layer_may_be_missing_or_only_in_the_input(run, files):
    save_file({k: v for k, v in weights(1).items() if k != "head.weight"}, "a.safetensors")
    save_file(weights(2) | {"lm.weight": torch.ones(2, 2)}, "b.safetensors")
    assert run(*MERGE, "--private", "head.*", "--private", "lm.*", "a.safetensors", "b.safetensors")[0] == 0
    assert set(record()["inputs"][1]["left_out"]) == {"head.weight", "lm.weight", "steps"}


def test_a_kinds_file_decides_how_layers_take_part(run, files):
    Path("kinds.toml").write_text('vector = ["half.*"]\nprivate = ["head.*"]\nconstant = ["brain.*"]\n')
    assert run(*MERGE, "--kinds", "kinds.toml", "a.safetensors", "b.safetensors")[0] == 0
    kinds = record()["kinds"]
    assert set(kinds["vector"]) == {"body.bias", "half.weight"}
    assert (kinds["matrix"], kinds["private"]) == (["body.weight"], ["head.weight"])
    assert set(kinds["constant"]) == {"brain.weight", "steps"}
    assert torch.equal(load_file("out.safetensors")["brain.weight"], weights(0)["brain.weight"])


def test_task_vector_files_merge_like_the_checkpoints_they_came_from(run, files):
    for name in "ab":
        assert run("diff", "base.safetensors", f"{name}.safetensors", "-o", f"tau-{name}.safetensors")[0] == 0
    assert run(*MERGE, "tau-a.safetensors", "b.safetensors")[0] == 0
    assert same(load_file("out.safetensors"), by_hand("ab"))
    assert [row["kind"] for row in record()["inputs"]] == ["task vector", "checkpoint"]


# --- errors ---


def bad_nan(folder: Path) -> None:
    broken = weights(2)
    broken["body.bias"][-1] = torch.nan
    save_file(broken, folder / "bad.safetensors")


def bad_shape(folder: Path) -> None:
    save_file(weights(2) | {"body.weight": torch.ones(20, 24)}, folder / "bad.safetensors")


def bad_extra(folder: Path) -> None:
    save_file(weights(2) | {"lm.weight": torch.ones(2, 2)}, folder / "bad.safetensors")


def bad_missing(folder: Path) -> None:
    save_file({k: v for k, v in weights(2).items() if k != "body.bias"}, folder / "bad.safetensors")


def bad_pickle(folder: Path) -> None:
    torch.save(weights(2), folder / "bad.safetensors")


INPUT = ("a.safetensors", "bad.safetensors")
ERRORS = {
    "an input that is not there": (lambda _: None, INPUT, "bad.safetensors"),
    "NaN in the second input": (bad_nan, INPUT, "layer 'body.bias': values that are not finite"),
    "a transposed layer": (bad_shape, INPUT, "It looks transposed."),
    "an extra layer": (bad_extra, INPUT, "layer 'lm.weight': not a layer of the base"),
    "a missing layer": (bad_missing, INPUT, "layer 'body.bias': a layer of the base is missing"),
    "a pickle": (bad_pickle, INPUT, "bad.safetensors"),
    "an unknown rule": (lambda _: None, ("a.safetensors", "--rule", "fedprox"), "no such merge rule"),
    "two rules": (lambda _: None, ("a.safetensors", "--rule", "opcm,average"), "name one rule"),
    "an option out of range": (lambda _: None, ("a.safetensors", "--set", "alpha=7"), "option 'alpha'"),
    "another suffix": (
        lambda _: None,
        ("a.safetensors", "--out", "out.bin"),
        "a name ending in .safetensors",
    ),
    "no such folder": (lambda _: None, ("a.safetensors", "--out", "no/out.safetensors"), "no such folder"),
    "no such base": (lambda _: None, ("a.safetensors", "--base", "no.safetensors"), "no.safetensors"),
    "no such kinds": (lambda _: None, ("a.safetensors", "--kinds", "no.toml"), "no.toml: cannot be read"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_clear_line_and_nothing_is_written(run, files, case):
    prepare, arguments, says = ERRORS[case]
    prepare(files)
    before = sorted(files.iterdir())
    code, _, err = run(*MERGE, *arguments)
    assert code == 2
    (line,) = err.strip().splitlines()
    assert line.startswith("error (")
    assert says in line
    assert sorted(files.iterdir()) == before


KINDS = {
    "not TOML": ("matrix = [", "not TOML"),
    "an unknown kind": ('embedding = ["a"]', "not a layer kind: got 'embedding', wanted matrix or"),
    "not a list": ('vector = "body.*"', "not a list of name patterns"),
    "not patterns": ("vector = [1]", "not a list of name patterns"),
    "a pattern of nothing": ('vector = ["bodi.*"]', "a kind's pattern matches no layer: got 'bodi.*'"),
    "a row as a matrix": ('matrix = ["body.bias"]', "only tensors of two or more dimensions are matrices"),
}


@pytest.mark.parametrize("case", KINDS)
def test_a_wrong_kinds_file_is_refused(run, files, case):
    text, says = KINDS[case]
    Path("kinds.toml").write_text(text)
    code, _, err = run(*MERGE, "--kinds", "kinds.toml", "a.safetensors")
    assert code == 2
    assert says in err
    assert not Path("out.safetensors").exists()


def test_a_failed_merge_leaves_an_older_result_alone(run, files):
    run(*MERGE, "a.safetensors")
    before = Path("out.safetensors").read_bytes(), Path("out.json").read_bytes()
    bad_nan(files)
    assert run(*MERGE, *INPUT)[0] == 2
    assert (Path("out.safetensors").read_bytes(), Path("out.json").read_bytes()) == before


def test_the_installed_command_fails_in_one_line_too(tmp_path):
    command = [
        sys.executable,
        "-c",
        "from fedmerge.deploy.cli import main; main()",
        "inspect",
        "no.safetensors",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error (FileError): no.safetensors: ")
    assert done.stderr.count("\n") == 1


def test_the_version_is_printed(run):
    assert run("--version") == (0, f"{__version__}\n", "")


# --- diff ---


def test_a_difference_holds_tuned_minus_base(run, files):
    code, out, _ = run("diff", "base.safetensors", "a.safetensors", "-o", "tau.safetensors", "--task", "cats")
    assert code == 0
    vector = load("tau.safetensors")
    assert (vector.manifest.task, vector.manifest.base) == (
        "cats",
        Base.from_checkpoint(weights(0)).fingerprint,
    )
    for name in ("body.weight", "half.weight", "brain.weight"):
        wanted = weights(1)[name].float() - weights(0)[name].float()
        assert torch.equal(vector.read(name).to_dense(), wanted)
    assert f"{Path('tau.safetensors').stat().st_size:,} bytes, 5 layers" in out
    assert f"norm {vector.norm():.4g}" in out


def test_a_rank_keeps_the_strongest_directions(run, files):
    code, out, _ = run("diff", "base.safetensors", "a.safetensors", "-o", "tau.safetensors", "--rank", 3)
    assert code == 0
    update = load("tau.safetensors").read("body.weight")
    assert isinstance(update, LowRank)
    assert update.rank == 3
    whole = (weights(1)["body.weight"] - weights(0)["body.weight"]).double()
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    best = (left[:, :3] * values[:3]) @ right[:3]
    assert torch.allclose(update.to_dense().double(), best, atol=1e-4)
    assert "truncation left out" in out


def test_an_energy_keeps_the_fewest_directions_that_hold_it(run, files):
    assert run("diff", "base.safetensors", "a.safetensors", "-o", "tau.safetensors", "--energy", 0.5)[0] == 0
    update = load("tau.safetensors").read("body.weight")
    squares = torch.linalg.svdvals((weights(1)["body.weight"] - weights(0)["body.weight"]).double()).square()
    wanted = int((squares.cumsum(0) / squares.sum() < 0.5).sum()) + 1
    assert update.rank == wanted


def test_a_truncation_that_would_not_be_smaller_is_not_made(run, files):
    assert run("diff", "base.safetensors", "a.safetensors", "-o", "tau.safetensors", "--rank", 15)[0] == 0
    vector = load("tau.safetensors")
    wanted = weights(1)["body.weight"] - weights(0)["body.weight"]
    assert torch.equal(vector.read("body.weight").to_dense(), wanted)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("a.safetensors", "--rank", "2", "--energy", "0.5"), "choose one way to truncate"),
        (("bad.safetensors",), "layer 'body.bias': values that are not finite"),
        (("no.safetensors",), "no.safetensors"),
    ],
)
def test_a_difference_that_cannot_be_made_is_refused_and_not_written(run, files, arguments, says):
    bad_nan(files)
    before = sorted(files.iterdir())
    code, _, err = run("diff", "base.safetensors", *arguments, "-o", "tau.safetensors")
    assert code == 2
    assert says in err
    assert sorted(files.iterdir()) == before


def test_private_layers_are_left_out_of_a_difference(run, files):
    arguments = ("diff", "base.safetensors", "a.safetensors", "-o", "tau.safetensors", "--private", "head.*")
    assert run(*arguments)[0] == 0
    assert "head.weight" not in load("tau.safetensors").names


# --- inspect ---


def test_a_checkpoint_is_shown_by_layer(run, files):
    code, out, _ = run("inspect", "base.safetensors")
    assert code == 0
    assert "base.safetensors: checkpoint" in out
    for name in LAYOUT:
        assert name in out
    assert "bfloat16" in out
    assert f"{float(weights(0)['body.bias'].norm()):.4g}" in out


def test_a_task_vector_is_shown_with_where_it_comes_from(run, files):
    run("diff", "base.safetensors", "a.safetensors", "-o", "tau.safetensors", "--rank", 2, "--task", "cats")
    code, out, _ = run("inspect", "tau.safetensors")
    assert code == 0
    assert "tau.safetensors: task vector" in out
    assert f"base {Base.from_checkpoint(weights(0)).fingerprint[:12]}, task cats" in out
    assert "rank 2" in out
    assert "dense" in out


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x80\x05K\x01."])
def test_a_file_that_is_neither_is_refused(run, tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    code, _, err = run("inspect", "x.safetensors")
    assert (code, "x.safetensors" in err) == (2, True)


# --- models of the Hugging Face ---


@pytest.fixture
def bert(run, tmp_path) -> BertForSequenceClassification:
    """A tiny BERT in the folder ``bert``."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BERT)
    model.save_pretrained(tmp_path / "bert")
    return model


def tuned(folder: str, seed: int) -> None:
    torch.manual_seed(seed)
    BertForSequenceClassification(BERT).save_pretrained(folder)


def test_pretrained_folders_merge_and_load_again(run, bert):
    tuned("one", 1)
    tuned("two", 2)
    code, _, err = run(
        "merge", "--base", "bert", "--out", "out.safetensors", "--private", "classifier.*", "one", "two"
    )
    assert (code, err) == (0, "")
    merged = load_file("out.safetensors")
    own = bert.state_dict()
    assert set(merged) == set(load_file("bert/model.safetensors"))
    assert torch.equal(merged["classifier.weight"], own["classifier.weight"])
    assert not torch.equal(merged["bert.pooler.dense.weight"], own["bert.pooler.dense.weight"])
    bert.load_state_dict(merged)
    kinds = record()["kinds"]
    assert "bert.embeddings.word_embeddings.weight" in kinds["vector"]
    assert "bert.encoder.layer.0.attention.self.query.weight" in kinds["matrix"]


@pytest.fixture
def adapted(bert) -> dict[str, torch.Tensor]:
    """A LoRA adapter in the folder ``lora``, and the weights that peft merges it to."""
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["query", "value"])
    model = get_peft_model(bert, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained("lora")
    return {name: values.clone() for name, values in model.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("rule", ["opcm", "average"])
def test_one_adapter_merges_to_what_peft_merges_it_to(run, adapted, rule):
    assert run("merge", "--base", "bert", "--out", "out.safetensors", "--rule", rule, "lora")[0] == 0
    merged = load_file("out.safetensors")
    assert set(merged) <= set(adapted)
    for name, values in merged.items():
        assert torch.allclose(values, adapted[name], rtol=2e-6, atol=2e-6), name
    (row,) = record()["inputs"]
    assert (row["kind"], row["changed"], row["low_rank"]) == ("adapter", 2, 2)
    assert len(row["unchanged"]) == len(merged) - 2


def test_an_adapter_and_a_checkpoint_merge_together(run, adapted):
    tuned("one", 1)
    assert run("merge", "--base", "bert", "--out", "out.safetensors", "lora", "one")[0] == 0
    assert [row["kind"] for row in record()["inputs"]] == ["adapter", "checkpoint"]


def test_an_adapter_is_shown_with_its_settings(run, adapted):
    code, out, _ = run("inspect", "lora")
    assert code == 0
    assert "lora: PEFT adapter" in out
    assert all(shown in out for shown in ("LORA", "r 2", "alpha 6"))
    assert "query.lora_A.weight" in out


def test_an_adapter_of_another_model_is_refused(run, files, adapted):
    code, _, err = run(*MERGE, "lora")
    assert code == 2
    assert "lora" in err
    assert not Path("out.safetensors").exists()


def test_rules_that_need_statistics_refuse_checkpoints_which_bring_none(run, files):
    code, _, error = run(*MERGE, "--rule", "fisher", "a.safetensors")
    assert code == 2
    assert "rule fisher asks for fisher" in error
    assert "got no statistics" in error
    assert not (files / "out.safetensors").exists()
