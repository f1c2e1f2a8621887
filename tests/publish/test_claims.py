"""The ledger of claims: every verdict that a rule names can come out, and what is wrong is said in one line."""

import inspect
from collections import defaultdict
from pathlib import Path

import pytest

from lora_distill import settings
from lora_distill.publish import claims
from lora_distill.publish.claims import ClaimsError
from lora_distill.publish.plots import FIGURES
from lora_distill.publish.rules import RULES
from lora_distill.storage import read_table, save_table

LEDGER = {claim.id: claim for claim in claims.load()}

# Numbers that make a claim reproduced, then what to change of them for the other verdicts.
HALF = (
    {"before": 10, "after": 4, "paper_1": 60, "paper_16": 50},
    {"partly": {"paper_16": 49.9}, "not reproduced": {"after": 5.1, "paper_16": 9}},
)
KEPT = (
    {"teacher": 80, "teacher_sd": 0.3, "student": 80.5, "student_sd": 0.4, "unguided": 100},
    {"too coarse": {"student": 82.5}, "not reproduced": {"student": 83.5}},
)
AGAINST_COPY = (
    {"copied": 80, "copied_sd": 0.3, "student": 80.5, "student_sd": 0.4, "teacher": 80, "unguided": 100},
    {"too coarse": {"student": 82.5}, "not reproduced": {"student": 83.5}},
)
ORDER_OF_LCM = {"lcm_8k": 93, "lcm_8k_sd": 0.8, "lcm_30k": 90, "lcm_30k_sd": 0.6}
CASES = {
    "inference-time-40-percent": (
        {"saving_25": 42, "saving_50": 44, "unet_saving": 45, "student_slowest": 93, "teacher_fastest": 150},
        {"partly": {"saving_25": 39.9}, "not reproduced": {"saving_50": 19.9}},
    ),
    "inference-time-as-deployed": (
        {
            "threads": [1, 2],
            "saving_percent": [43, 40],
            "student_slowest": [0.5, 0.4],
            "teacher_fastest": [0.9, 0.5],
            "in_pytorch_percent": [30, 20],
        },
        {"partly": {"saving_percent": [43, 39.9]}, "not reproduced": {"saving_percent": [43, 19.9]}},
    ),
    "memory-half-training": HALF,
    "memory-half-inference": HALF,
    "memory-half-before-distillation": HALF,
    "memory-half-sharing": ({**HALF[0], "most": 60}, HALF[1]),
    "conventional-raises-memory": (
        {"full_1": 17, "full_16": 32, "distillation_1": 20, "distillation_16": 35},
        {"partly": {"distillation_16": 32.2}, "not reproduced": {"distillation_1": 17, "distillation_16": 32}},
    ),
    "quality-kept": KEPT,
    "alignment-kept": (
        {"teacher": 98, "teacher_sd": 0.3, "student": 97.5, "student_sd": 0.4, "unguided": 78},
        {"too coarse": {"student": 95.5}, "not reproduced": {"student": 94.5}},
    ),
    "finetune-fid-below-base": (
        {"base": 90, "base_sd": 0.8, "rank_4": 87, "rank_4_sd": 0.6, "rank_16": 80, "rank_16_sd": 0.6},
        {
            "partly": {"rank_4": 88.1},
            "too coarse": {"rank_4": 88.1, "rank_16": 88.1},
            "not reproduced": {"rank_4": 91, "rank_16": 91},
        },
    ),
    "lcm-lora-fid-above-base": (
        {"base": 80, "base_sd": 0.8, **ORDER_OF_LCM},
        {
            "partly": {"lcm_30k": 81.9},
            "too coarse": {"lcm_8k": 81.9, "lcm_30k": 81.9},
            "not reproduced": {"lcm_8k": 79, "lcm_30k": 79},
        },
    ),
    "larger-data-better": (ORDER_OF_LCM, {"too coarse": {"lcm_30k": 91.1}, "not reproduced": {"lcm_30k": 93.5}}),
    "lcm-lora-2-4-times-faster": (
        {"times": 2.7, "base_fastest": 0.26, "lcm_slowest": 0.105},
        {"partly": {"base_fastest": 0.25}, "not reproduced": {"base_fastest": 0.1}},
    ),
    "larger-data-faster": (
        {"small": 0.1, "small_fastest": 0.09, "large": 0.08, "large_slowest": 0.085},
        {"not reproduced": {"large_slowest": 0.091}},
    ),
    "memory-training-on-gpu": (
        {"conventional_1": 20, "conventional_16": 36, "shared_1": 6, "shared_16": 18},
        {"partly": {"shared_16": 24}, "not reproduced": {"shared_1": 11, "shared_16": 24}},
    ),
    "memory-inference-on-gpu": (
        {"guided_1": 2, "guided_16": 4, "one_pass_1": 1, "one_pass_16": 2},
        {"partly": {"one_pass_1": 1.9}, "not reproduced": {"one_pass_1": 1.9, "one_pass_16": 2.8}},
    ),
    "inference-time-on-gpu": (
        {"saving_1": 41, "saving_16": 45},
        {"partly": {"saving_1": 20}, "not reproduced": {"saving_1": 20, "saving_16": 39}},
    ),
    "memory-account-is-true": (
        {"simulated_least": 0.99, "simulated_most": 1.01, "measured_least": 0.96, "measured_most": 1.04},
        {"partly": {"measured_most": 1.06}, "not reproduced": {"simulated_least": 0.9}},
    ),
    "distance-against-standard-distillation": AGAINST_COPY,
    "inception-score-kept": (
        {"teacher": 10, "teacher_sd": 0.03, "student": 9.9, "student_sd": 0.04},
        {"too coarse": {"student": 9.45}, "not reproduced": {"student": 9.3}},
    ),
    "alignment-against-standard-distillation": (
        {"copied": 98, "copied_sd": 0.3, "student": 97.5, "student_sd": 0.4, "teacher": 98, "unguided": 78},
        {"too coarse": {"student": 95.5}, "not reproduced": {"student": 94.5}},
    ),
    "time-over-batch-and-resolution": (
        {"least": 40, "middle": 42, "most": 45},
        {"partly": {"least": 39.9}, "not reproduced": {"least": 30, "middle": 35, "most": 39.9}},
    ),
    "time-against-standard-distillation": (
        {"copied": 0.1, "copied_slowest": 0.11, "student": 0.105, "student_fastest": 0.1},
        {"partly": {"student_fastest": 0.111}, "not reproduced": {"student": 0.121}},
    ),
    "lcm-lora-time-over-batch-and-resolution": (
        {"least_saved": 60, "most_saved": 90},
        {"partly": {"least_saved": 58}, "not reproduced": {"least_saved": 30, "most_saved": 58}},
    ),
    "lcm-lora-alignment": (
        {"base": 98, "base_sd": 0.3, "lcm": 97.5, "lcm_sd": 0.4, "untrained": 78},
        {"too coarse": {"lcm": 95.5}, "not reproduced": {"lcm": 94.5}},
    ),
    "lcm-lora-against-untrained": (
        {"untrained": 90, "untrained_sd": 0.8, "lcm": 93, "lcm_sd": 0.6},
        {"too coarse": {"lcm": 91.9}, "not reproduced": {"lcm": 88.5}},
    ),
}
for _name, (_base, _) in CASES.items():
    if any(key.endswith("_sd") for key in _base):
        _base["seeds"] = 3
RULED = [(name, verdict, base | more) for name, (base, others) in CASES.items()
         for verdict, more in [("reproduced", {}), *others.items()]]  # fmt: skip


def write_tables(claim, values: dict[str, float | list[float]], folder: Path) -> None:
    """Tables in which a claim's quantities have these values; several values of a column become as many rows."""
    tables = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for name, q in claim.measured.items():
        place = settings.results_folders(q.profile)[0] if q.profile else folder
        value = values[name]
        column = tables[place / f"{q.table}.csv"][tuple(q.where.items())][q.column]
        column.extend(value if isinstance(value, list) else [value])
    for path, places in tables.items():
        rows = []
        for where, columns in places.items():
            for i in range(max(map(len, columns.values()))):
                rows.append(dict(where) | {name: column[i] for name, column in columns.items() if i < len(column)})
        names = list(dict.fromkeys(name for row in rows for name in row))
        save_table(path, [{name: row.get(name) for name in names} for row in rows])


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """A repository without results."""
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "cpu.yaml").write_text("profile: cpu\n", encoding="utf-8")
    monkeypatch.setattr(settings, "PACKAGE", tmp_path / "lora_distill")
    return tmp_path


@pytest.mark.parametrize(("name", "verdict", "values"), RULED, ids=[f"{n}-{v}" for n, v, _ in RULED])
def test_every_verdict_can_come_out(name, verdict, values, tmp_path):
    write_tables(LEDGER[name], values, tmp_path / "cpu")
    judged = claims.judge(LEDGER[name], tmp_path / "cpu")
    assert judged.verdict == verdict.replace("too coarse", "not testable here"), judged.quantities
    assert judged.here.endswith(": too coarse to tell") == (verdict == "too coarse")
    assert judged.quantities == values and judged.why == RULES[name].__doc__


def test_every_rule_has_its_claim_and_its_cases():
    """A rule takes what its claim measures, and has a case for each verdict that its docstring names."""
    assert RULES.keys() == CASES.keys() == {name for name, claim in LEDGER.items() if not claim.not_testable}
    for name, (_, others) in CASES.items():
        assert set(inspect.signature(RULES[name]).parameters) == LEDGER[name].measured.keys(), name
        named = {verdict for verdict in ("Reproduced", "Partly", "Too coarse") if f"{verdict}: " in RULES[name].__doc__}
        assert {"reproduced", *others} == {*map(str.lower, named), "not reproduced"}, name


SPREAD = [name for name, (base, _) in CASES.items() if "seeds" in base]
MARGIN = {  # what makes the margin zero, and what makes it negative
    "quality-kept": ("unguided", 80, 70),
    "alignment-kept": ("unguided", 98, 99),
    "distance-against-standard-distillation": ("unguided", 80, 70),
    "alignment-against-standard-distillation": ("unguided", 98, 99),
    "lcm-lora-alignment": ("untrained", 98, 99),
    "inception-score-kept": ("teacher", 0, -1),
}


@pytest.mark.parametrize("name", SPREAD)
def test_one_seed_cannot_tell(name, tmp_path):
    """Its deviation is 0 because there is nothing to deviate from."""
    zero = {key: 0 for key in CASES[name][0] if key.endswith("_sd")}
    write_tables(LEDGER[name], CASES[name][0] | zero | {"seeds": 1}, tmp_path / "cpu")
    judged = claims.judge(LEDGER[name], tmp_path / "cpu")
    assert judged.verdict == "not testable here" and judged.here.endswith(": one seed has no spread, cannot tell")


@pytest.mark.parametrize("below", [0, 1], ids=["zero", "negative"])
@pytest.mark.parametrize("name", MARGIN)
def test_without_a_positive_margin_nothing_is_told(name, below, tmp_path):
    key, *values = MARGIN[name]
    write_tables(LEDGER[name], CASES[name][0] | {key: values[below]}, tmp_path / "cpu")
    judged = claims.judge(LEDGER[name], tmp_path / "cpu")
    assert judged.verdict == "not testable here" and judged.here.endswith(": no positive margin, cannot tell")


def test_every_rule_with_a_margin_is_tried_without_one():
    assert {name for name in RULES if "margin" in RULES[name].__doc__} == MARGIN.keys()


def test_a_verdict_on_40_percent_goes_by_medians_and_shows_the_slowest_run_and_pytorch():
    verdict, here = RULES["inference-time-as-deployed"]([1, 2], [43, 41], [0.5, 0.4], [0.9, 0.5], [30, 20])
    assert verdict == "reproduced"
    assert here == (
        "43 and 41 % less on 1 and 2 threads (medians), 44.44 and 20 % for the slowest run against the teacher's "
        "fastest; 30 and 20 % in PyTorch"
    )


def test_quality_is_ruled_with_its_spread():
    spreads = {"all_correct": "all_correct_sd", "alignment": "alignment_sd", "content": "content_sd"}
    spreads = {f"{name}_percent": sd for name, sd in spreads.items()}
    spreads |= {
        "fd_efficientnet_lite0": "fd_efficientnet_lite0_sd",
        "is_efficientnet_lite0": "is_efficientnet_lite0_sd",
    }
    for claim in LEDGER.values():
        columns = {q.column for q in claim.measured.values()}
        assert columns >= {spreads[column] for column in columns & spreads.keys()}, claim.id


def test_what_a_run_did_not_measure_is_not_testable(tmp_path):
    verdicts = claims.ledger(tmp_path / "cpu")
    assert {v.verdict for v in verdicts} == {"not testable here"} and all(v.why == v.here for v in verdicts)
    assert claims.summary(verdicts).endswith(f"{len(LEDGER)} not testable here")


def test_a_table_of_one_profile_is_looked_for_in_its_run_and_then_in_its_committed_figures(checkout):
    claim, values = LEDGER["memory-inference-on-gpu"], CASES["memory-inference-on-gpu"][0]
    assert claims.judge(claim, checkout).here == "no 01_measured_memory.csv of profile sd15-shape yet"
    write_tables(claim, values | {"one_pass_1": 1.5}, checkout)
    (checkout / "runs").rename(checkout / "moved")
    (checkout / "figures").mkdir()
    (checkout / "moved" / "sd15-shape" / "figures").rename(checkout / "figures" / "sd15-shape")
    assert claims.judge(claim, checkout).quantities["one_pass_1"] == 1.5
    write_tables(claim, values, checkout)
    assert claims.judge(claim, checkout).quantities == values


def test_a_verdict_on_measured_memory_says_machine_precision_runtime_batch_and_size(checkout):
    claim = LEDGER["memory-half-training"]
    write_tables(claim, HALF[0], checkout)
    path = checkout / "runs" / "sd15-shape" / "figures" / "01_measured_memory.csv"
    save_table(path, [row | {"machine": "a CPU, 2 cores", "runtime": "PyTorch"} for row in read_table(path)])
    here = claims.judge(claim, checkout).here
    assert here.endswith(" on paper [a CPU, 2 cores; float32; PyTorch; batch 1; 512 px]")


class TestTables:
    claim = LEDGER["quality-kept"]
    path = "02_quality.csv"

    @pytest.fixture
    def folder(self, tmp_path):
        write_tables(self.claim, KEPT[0], tmp_path / "cpu")
        return tmp_path / "cpu"

    def change(self, folder: Path, old: str, new: str) -> None:
        text = (folder / self.path).read_text(encoding="utf-8")
        assert old in text
        (folder / self.path).write_text(text.replace(old, new), encoding="utf-8")

    def test_a_row_that_is_not_there(self, folder):
        self.change(folder, "LoRA student", "another student")
        verdict = claims.judge(self.claim, folder)
        assert verdict.verdict == "not testable here"
        assert verdict.here == "no fd_efficientnet_lite0 in 02_quality.csv for method LoRA student"

    def test_an_empty_value(self, folder):
        self.change(folder, "80.5", "")
        assert claims.judge(self.claim, folder).verdict == "not testable here"

    def test_a_column_that_is_not_there(self, folder):
        """As on photographs, of which there is no reader's verdict."""
        self.change(folder, "lite0_sd", "lite0_spread")
        verdict = claims.judge(self.claim, folder)
        assert verdict.verdict == "not testable here"
        assert verdict.here == "no fd_efficientnet_lite0_sd in 02_quality.csv"

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("method,", "methods,", "has no column 'method'; it has methods, fd_efficientnet_lite0, fd_"),
            ("80.5", "much", "02_quality.csv: fd_efficientnet_lite0, method LoRA student: expected numbers"),
            ("no guidance", "LoRA student", "02_quality.csv: 2 rows for method LoRA student; one was expected"),
            ("80.5", "80.5,1,2", "02_quality.csv is no table: "),
            ("80.5", "inf", "02_quality.csv: fd_efficientnet_lite0, method LoRA student: expected finite numbers"),
            ("80.5", "-inf", "02_quality.csv: fd_efficientnet_lite0, method LoRA student: expected finite numbers"),
            ("80.5", "True", "expected numbers"),
            ("80.5", '"80.5', "02_quality.csv is no table: "),
            ("lite0_sd", "lite0", "line 1: expected the names of columns, each once"),
            ("80.5,", "", "values for"),
        ],
    )
    def test_a_malformed_table_is_named(self, folder, old, new, message):
        self.change(folder, old, new)
        with pytest.raises(ClaimsError) as error:
            claims.judge(self.claim, folder)
        assert message in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)

    @pytest.mark.parametrize("change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
    def test_what_a_spreadsheet_does_to_a_table_changes_nothing(self, folder, change):
        before = claims.judge(self.claim, folder)
        text = (folder / self.path).read_text(encoding="utf-8")
        (folder / self.path).write_bytes(change(text).encode())
        assert claims.judge(self.claim, folder) == before

    def test_a_number_that_rows_are_chosen_by_and_that_is_text_is_named(self, tmp_path):
        """Compared as text, no row would be found, and the claim not be testable."""
        quantity = claims.Quantity(table="t", where={"batch": 1}, column="x")
        (tmp_path / "t.csv").write_text("batch,x\n1,5\n2,6\n", encoding="utf-8")
        assert claims.measure(quantity, tmp_path) == 5
        (tmp_path / "t.csv").write_text("batch,x\n1,5\ntwo,6\n", encoding="utf-8")
        with pytest.raises(ClaimsError, match=r"t.csv: batch: expected numbers"):
            claims.measure(quantity, tmp_path)

    def test_a_folder_in_the_place_of_a_table_is_named(self, folder):
        (folder / self.path).unlink()
        (folder / self.path).mkdir()
        with pytest.raises(ClaimsError, match=r"02_quality\.csv is no table"):
            claims.judge(self.claim, folder)

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"\x00" * 40, b"\n", b",,\n", b"\x89PNG\r\n\x1a\n"])
    def test_a_damaged_table_is_named(self, folder, content):
        (folder / self.path).write_bytes(content)
        with pytest.raises(ClaimsError, match=r"02_quality\.csv is no table"):
            claims.judge(self.claim, folder)


ENTRY = """
- id: some-claim
  work: paper
  statement: It is faster.
  source: abstract
  stated: 40 %
  measured:
    saving: {table: 02_seconds, where: {threads: 1}, column: saving_percent}
"""


class TestFile:
    def read(self, tmp_path: Path, text: str):
        path = tmp_path / "claims.yaml"
        path.write_text(text, encoding="utf-8")
        return claims.load(path)

    def test_a_claim_as_it_should_be(self, tmp_path):
        (claim,) = self.read(tmp_path, ENTRY)
        assert claim.measured["saving"].where == {"threads": 1} and claim.measured["saving"].take == "only"

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("  source: abstract\n", "", "claim some-claim: source: field required"),
            ("statement", "statment", "claim some-claim: statment: unknown key; did you mean 'statement'?"),
            ("  measured", "  notse: x\n  measured", "claim some-claim: notse: unknown key; did you mean 'notes'?"),
            ("where", "were", "claim some-claim: measured.saving.were: unknown key; did you mean 'where'?"),
            ("threads: 1", "threads: [1]", "claim some-claim: measured.saving.where.threads"),
            ("work: paper", "work: book", "claim some-claim: work: input should be 'paper', 'slides' or 'readers'"),
            ("id: some-claim", "id: some claim", "claim some claim: id: string should match"),
            ("  measured", "  not_testable: why\n  measured", "claim some-claim: not_testable: needed where"),
            (ENTRY[ENTRY.index("  measured"):], "", "claim some-claim: not_testable: needed where"),
            ("\n- id", "\nclaims:\n- id", "expected a list of claims"),
            ("paper", "{", "is not YAML"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_one_line(self, tmp_path, old, new, message):
        assert old in ENTRY
        with pytest.raises(ClaimsError) as error:
            self.read(tmp_path, ENTRY.replace(old, new, 1))
        assert str(error.value).startswith("claims.yaml") and message in str(error.value)
        assert "\n" not in str(error.value)

    def test_an_id_is_there_once(self, tmp_path):
        with pytest.raises(ClaimsError, match="claim some-claim: id: is there twice"):
            self.read(tmp_path, ENTRY + ENTRY)


class TestLedgerAsText:
    @pytest.fixture
    def verdicts(self, tmp_path):
        for name in ("memory-half-training", "quality-kept"):
            write_tables(LEDGER[name], CASES[name][0], tmp_path / "cpu")
        return [claims.judge(LEDGER[name], tmp_path / "cpu") for name in ("memory-half-training", "slides-fid-values")]

    def test_table(self, verdicts):
        table = claims.as_table(verdicts)
        here = "60 % less at batch 1, measured (10 → 4 GB; 60 % on paper), 50 % at 16 on paper"
        assert f"| 50 % less | {here} | reproduced |" in table
        assert table.endswith("2 claims: 1 reproduced, 0 partly, 0 not reproduced, 1 not testable here.")

    def test_rows(self, verdicts, tmp_path):
        ruled, untested = claims.as_rows(verdicts)
        assert (
            ruled.keys() == untested.keys()
            and ruled["quantities"] == "before = 10; after = 4; paper_1 = 60; paper_16 = 50"
        )
        assert untested["here"] == untested["why"] == LEDGER["slides-fid-values"].not_testable

    def test_lines(self, verdicts):
        text = claims.as_text(verdicts)
        assert "memory-half-training: reproduced\n" in text and f"rule: {RULES['memory-half-training'].__doc__}" in text


def test_every_claim_that_a_figure_bears_on_is_in_the_ledger():
    known = {claim.id for claim in claims.load()}
    assert {claim for plot in FIGURES.values() for claim in plot.claims} <= known
