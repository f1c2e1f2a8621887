"""The ledger of claims: every verdict that a rule names can come out, and what is wrong is said in one line."""

import inspect
from collections import defaultdict
from pathlib import Path

import pytest

from lora_distill import settings
from lora_distill.publish import claims
from lora_distill.publish.claims import ClaimsError
from lora_distill.publish.plots import FIGURES
from lora_distill.publish.rules import RULES, Interval
from lora_distill.storage import read_table, save_table

LEDGER = {claim.id: claim for claim in claims.load()}


def near(value: float, by: float = 0.02) -> Interval:
    """A number with an interval of a few per cent of it, or of as much where it is about nothing."""
    by *= max(abs(value), 1)
    return Interval(value, value - by, value + by)


def wide(value: float) -> Interval:
    """A number that could as well be twice as large, or half."""
    return Interval(value, value / 2, value * 2)


# Numbers that give a claim its best verdict, then what to change of them for the others.
SECONDS = {"student_25": near(153), "teacher_25": near(250), "student_50": near(290), "teacher_50": near(500)}
HALF = (
    {"before": 10, "after": 4, "paper_1": 60, "paper_16": 50},
    {"direction only": {"paper_16": 33}, "not reproduced": {"after": 5.1, "paper_16": 0.5}},
)
HALF_CHECK = (HALF[0], {"fails": {"paper_16": 49.9}})
ERRORS = ({"errors": near(1.05)}, {"fails": {"errors": near(1.4)}, "cannot tell": {"errors": wide(1.05)}})
RATHER_LESS = ({"errors": near(0.5)}, {"fails": {"errors": near(0.95)}, "cannot tell": {"errors": wide(0.9)}})
SAME_KID = {"kid": near(0, 0.01)}
GPU_SECONDS = {"student_1": near(55), "teacher_1": near(100), "student_16": near(50), "teacher_16": near(100)}
CASES = {
    "inference-time-40-percent": (
        SECONDS | {"unet_saving": 45},
        {
            "direction only": {"student_25": near(100)},
            "not reproduced": {"student_50": near(500, 0.01)},
            "not testable here": {"student_50": Interval(450, 300, 520)},
        },
    ),
    "memory-half-training": HALF,
    "memory-half-before-distillation": HALF,
    "conventional-raises-memory": (
        {"full_1": 17, "full_16": 32, "distillation_1": 20, "distillation_16": 35},
        {"not reproduced": {"distillation_16": 32.2}},
    ),
    "quality-kept": (
        {"fd_ratio": near(1.03), "unguided": near(1.3)} | SAME_KID,
        {"not reproduced": {"fd_ratio": near(1.2)}, "not testable here": {"fd_ratio": near(1.1)}},
    ),
    "alignment-kept": (
        {"errors": near(1.05)},
        {"not reproduced": {"errors": near(1.4)}, "not testable here": {"errors": wide(1.05)}},
    ),
    "finetune-fid-below-base": (
        {"fd_ratio": near(0.9), "kid": near(-0.1), "narrow": near(1)},
        {"not reproduced": {"fd_ratio": near(1.02)}, "not testable here": {"fd_ratio": wide(0.9)}},
    ),
    "lcm-lora-fid-above-base": (
        {"lcm_8k": near(1.1), "kid_8k": near(0.1), "lcm_30k": near(1.2), "kid_30k": near(0)},
        {"not reproduced": {"lcm_30k": near(1.0)}, "not testable here": {"lcm_30k": wide(1.2)}},
    ),
    "larger-data-better": (
        {"fd_ratio": near(0.9)} | SAME_KID,
        {"not reproduced": {"fd_ratio": near(1)}, "not testable here": {"fd_ratio": wide(0.9)}},
    ),
    "lcm-lora-2-4-times-faster": (
        {"ratio": near(0.4), "lcm": 0.04, "base": 0.1, "base_unet": 0.08, "base_steps": 25},
        {
            "direction only": {"ratio": Interval(0.14, 0.13, 0.15)},
            "not reproduced": {"ratio": near(1)},
            "not testable here": {"ratio": wide(0.8)},
        },
    ),
    "larger-data-faster": (
        {"ratio": near(0.8)},
        {"not reproduced": {"ratio": near(1)}, "not testable here": {"ratio": wide(1)}},
    ),
    "memory-half-inference": HALF_CHECK,
    "memory-half-sharing": ({**HALF[0], "most": 60}, HALF_CHECK[1]),
    "memory-training-on-gpu": (
        {"conventional_1": 20, "conventional_16": 36, "shared_1": 6, "shared_16": 18},
        {"fails": {"shared_16": 24}},
    ),
    "memory-inference-on-gpu": (
        {"guided_1": 2, "guided_16": 4, "one_pass_1": 1, "one_pass_16": 2},
        {"fails": {"one_pass_1": 1.9}},
    ),
    "memory-account-is-true": (
        {"simulated_least": 0.99, "simulated_most": 1.01, "measured_least": 0.96, "measured_most": 1.04},
        {"fails": {"measured_most": 1.06}},
    ),
    "inference-time-on-gpu": (
        GPU_SECONDS,
        {"fails": {"student_16": near(70)}, "cannot tell": {"student_1": near(60, 0.05)}},
    ),
    "inference-time-as-deployed": (
        {"threads": [1, 2], "deployed": [near(0.55), near(0.57)], "in_pytorch": [near(0.7)]},
        {"fails": {"deployed": [near(0.55), near(0.65)]}, "cannot tell": {"deployed": [near(0.55), near(0.6)]}},
    ),
    "time-over-batch-and-resolution": (
        {"savings": [near(42), near(45)]},
        {"fails": {"savings": [near(42), near(30)]}, "cannot tell": {"savings": [near(42), near(40)]}},
    ),
    "time-against-standard-distillation": (
        {"ratios": [near(1.01), near(0.99)]},
        {"fails": {"ratios": [near(1), near(1.1)]}, "cannot tell": {"ratios": [near(1), near(1.05)]}},
    ),
    "alignment-kept-at-four-objects": ERRORS,
    "distance-against-standard-distillation": (
        {"fd_ratio": near(1.03), "unguided": near(1.3)} | SAME_KID,
        {"fails": {"fd_ratio": near(1.2)}, "cannot tell": {"fd_ratio": near(1.1)}},
    ),
    "alignment-against-standard-distillation": ERRORS,
    "pictures-against-standard-distillation": (
        {"psnr": near(-0.5)},
        {"fails": {"psnr": near(-2)}, "cannot tell": {"psnr": near(-1)}},
    ),
    "features-against-standard-distillation": (
        {"fd_to_teacher": Interval(0.01, 0, 0.02), "copied": 0.3},
        {"fails": {"fd_to_teacher": near(0.4)}, "cannot tell": {"fd_to_teacher": near(0.03)}},
    ),
    "loss-against-standard-distillation": (
        {"student": [0.9, 0.8, 0.2, 0.2], "copied": [0.5, 0.1, 0.2, 0.19]},
        {"fails": {"copied": [0.5, 0.5, 0.1, 0.2]}},
    ),
    "student-against-few-guided-steps": RATHER_LESS,
    "student-against-as-many-passes": RATHER_LESS,
    "lcm-lora-alignment": ERRORS,
    "lcm-lora-against-untrained": RATHER_LESS,
    "lcm-lora-against-few-guided-steps": ERRORS,
    "style-and-speed": (
        {"errors": near(0.98), "fine_tuned": 0.3},
        {"fails": {"errors": near(1.25)}, "cannot tell": {"errors": near(1.08)}},
    ),
}
BEST = {name: "holds" if LEDGER[name].work == "checks" else "direction only" for name in CASES}
BEST |= {name: "reproduced" for name in ("inference-time-40-percent", "lcm-lora-2-4-times-faster")}
BEST |= {name: "reproduced" for name in ("memory-half-training", "memory-half-before-distillation")}
RULED = [(name, verdict, base | more) for name, (base, others) in CASES.items()
         for verdict, more in [(BEST[name], {}), *others.items()]]  # fmt: skip


def write_tables(claim, values: dict, folder: Path) -> None:
    """Tables in which a claim's quantities have these values; several values of a column become as many rows."""
    tables = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for name, q in claim.measured.items():
        place = settings.results_folders(q.profile)[0] if q.profile else folder
        several = values[name] if isinstance(values[name], list) else [values[name]]
        for value in several:
            for column, number in zip(q.columns, value if isinstance(value, Interval) else [value], strict=True):
                tables[place / f"{q.table}.csv"][tuple(q.where.items())][column].append(number)
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
    assert judged.verdict == verdict, judged.here
    untold = verdict in ("not testable here", "cannot tell")
    assert judged.here.endswith(": the interval holds both answers") == untold
    assert judged.quantities == values and judged.why == RULES[name].__doc__


def test_every_rule_has_its_claim_and_its_cases():
    """A rule takes what its claim measures, and has a case for each verdict that its docstring names."""
    assert RULES.keys() == CASES.keys() == {name for name, claim in LEDGER.items() if not claim.not_testable}
    for name, (_, others) in CASES.items():
        assert set(inspect.signature(RULES[name]).parameters) == LEDGER[name].measured.keys(), name
        named = [
            verdict for verdict in ("Reproduced", "Direction only", "Holds") if f"{verdict}: " in RULES[name].__doc__
        ]
        tried = {BEST[name], *others} - {"not testable here", "cannot tell"}
        worst = "fails" if LEDGER[name].work == "checks" else "not reproduced"
        assert tried == {*map(str.lower, named), worst}, name
        assert tried <= set(LEDGER[name].ledger.verdicts), name


def test_a_rule_with_an_interval_can_leave_a_claim_untold():
    for name, (base, others) in CASES.items():
        values = [value[0] if isinstance(value, list) else value for value in base.values()]
        untold = {"not testable here", "cannot tell"} & others.keys()
        assert any(isinstance(value, Interval) for value in values) == bool(untold), name


def test_a_work_without_a_number_is_not_reproduced():
    for claim in LEDGER.values():
        if claim.work != "checks" and "no number" in claim.stated:
            assert "Reproduced: " not in RULES[claim.id].__doc__, claim.id


def test_seven_times_as_fast_is_no_reproduction_of_2_4_and_the_guided_steps_that_would_be_are_said():
    """0.04 s for LCM-LoRA times 2.41, less 0.02 s beside the UNet, is 23.8 steps of 0.08 / 25 s."""
    numbers = CASES["lcm-lora-2-4-times-faster"][0] | {"ratio": Interval(1 / 7.2, 1 / 7.5, 1 / 7)}
    verdict, here = RULES["lcm-lora-2-4-times-faster"](**numbers)
    assert verdict == "direction only"
    assert here == "7.2 (7 to 7.5) times faster than 25 guided steps; 2.4 times would be 24 guided steps"


@pytest.mark.parametrize(
    ("fd", "kid", "says"),
    [
        (near(0.9), near(-0.1), "KID is lower"),
        (near(0.9), near(0), "KID sees no difference"),
        (near(0.9), near(0.1), "KID is higher, against FD"),
        (near(1), near(0.1), "KID is higher, FD does not say so"),
        (near(1.1), near(0.1), "KID is higher"),
    ],
)
def test_where_the_two_distances_disagree_the_claim_says_so(fd, kid, says):
    assert RULES["quality-kept"](fd, kid, near(1.3))[1].split("; ")[1] == says


@pytest.mark.parametrize("name", ["quality-kept", "distance-against-standard-distillation"])
@pytest.mark.parametrize("unguided", [near(1.03), near(1.1)])
def test_a_distance_that_does_not_see_what_guidance_does_tells_nothing_equal(name, unguided, tmp_path):
    write_tables(LEDGER[name], CASES[name][0] | {"unguided": unguided}, tmp_path / "cpu")
    judged = claims.judge(LEDGER[name], tmp_path / "cpu")
    assert judged.verdict == LEDGER[name].ledger.verdicts[-1]
    assert judged.here.endswith(": the distance does not surely tell the base without guidance from the teacher")
    write_tables(LEDGER[name], CASES[name][0] | {"unguided": unguided, "fd_ratio": near(1.3)}, tmp_path / "cpu")
    assert claims.judge(LEDGER[name], tmp_path / "cpu").verdict in ("not reproduced", "fails"), (
        "a difference that it sees"
    )


def test_what_holds_by_construction_is_said_so(tmp_path):
    name = "time-against-standard-distillation"
    write_tables(LEDGER[name], CASES[name][0], tmp_path / "cpu")
    here = claims.judge(LEDGER[name], tmp_path / "cpu").here
    assert here.startswith("1.01 (0.99 to 1.03) and 0.99 (0.97 to 1.01) times the full copy's")
    assert "; by construction: merged, both are the same layers" in here


def test_a_claim_on_quality_decides_on_all_numbers_of_objects_and_has_an_interval():
    for claim in LEDGER.values():
        for q in claim.measured.values():
            if q.table in ("02_contrasts", "03_contrasts"):
                assert q.take == "interval" and q.column == "value"
                assert q.where["objects"] == ("4" if "four-objects" in claim.id else "all"), claim.id


def test_a_verdict_on_a_contrast_says_prompts_seeds_and_trainings(tmp_path):
    claim = LEDGER["alignment-kept"]
    write_tables(claim, {"errors": near(1.05)}, tmp_path)
    made = {"n": 1664, "seeds": 3, "trainings": 3}
    save_table(tmp_path / "02_contrasts.csv", [row | made for row in read_table(tmp_path / "02_contrasts.csv")])
    assert claims.judge(claim, tmp_path).here.endswith(" [N = 1664; seeds: 3; trainings: 3]")


def test_what_is_simulated_or_small_is_said_in_the_statement():
    for claim in LEDGER.values():
        if claim.work != "checks" and not claim.not_testable:
            assert "SD 1.5's architecture" in claim.statement or "small pipeline" in claim.statement, claim.id
        if any(q.table.startswith("03") for q in claim.measured.values()) and "Flickr" in claim.statement:
            assert "Flickr is played by scenes in a second style" in claim.statement, claim.id


def test_what_a_run_did_not_measure_is_not_testable(tmp_path):
    verdicts = claims.ledger(tmp_path / "cpu")
    assert {v.verdict for v in verdicts} == {"not testable here", "cannot tell"}
    assert all(v.why == v.here for v in verdicts)
    works, checks = claims.summary(verdicts).split("; ")
    assert (
        works
        == "Claims of the works: 12, of them 0 reproduced, 0 direction only, 0 not reproduced, 12 not testable here"
    )
    assert checks == "Our checks: 21, of them 0 holds, 0 fails, 21 cannot tell"


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
    path = "02_contrasts.csv"
    place = "method LoRA student, against teacher, two passes, measure FD ratio, objects all"

    @pytest.fixture
    def folder(self, tmp_path):
        values = {"fd_ratio": Interval(80.5, 70, 90), "kid": Interval(3, 2, 4), "unguided": Interval(95, 94, 96)}
        write_tables(self.claim, values, tmp_path / "cpu")
        return tmp_path / "cpu"

    def change(self, folder: Path, old: str, new: str) -> None:
        text = (folder / self.path).read_text(encoding="utf-8")
        assert old in text
        (folder / self.path).write_text(text.replace(old, new), encoding="utf-8")

    def test_a_row_that_is_not_there(self, folder):
        self.change(folder, "FD ratio", "another")
        verdict = claims.judge(self.claim, folder)
        assert verdict.verdict == "not testable here"
        assert verdict.here == f"no value in 02_contrasts.csv for {self.place}"

    def test_an_empty_value_or_bound(self, folder):
        self.change(folder, "90", "")
        assert claims.judge(self.claim, folder).verdict == "not testable here"

    def test_a_column_that_is_not_there(self, folder):
        self.change(folder, "high", "most")
        verdict = claims.judge(self.claim, folder)
        assert verdict.verdict == "not testable here"
        assert verdict.here == "no high in 02_contrasts.csv"

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("measure,", "measures,", "has no column 'measure'; it has method, against, measures, objects"),
            ("80.5", "much", f"02_contrasts.csv: value, {place}: expected numbers"),
            ("70", "much", f"02_contrasts.csv: low, {place}: expected numbers"),
            ("KID difference", "FD ratio", f"02_contrasts.csv: 2 rows for {place}; one was expected"),
            ("80.5", "80.5,1,2", "02_contrasts.csv is no table: "),
            ("80.5", "inf", f"02_contrasts.csv: value, {place}: expected finite numbers"),
            ("70", "-inf", f"02_contrasts.csv: value, {place}: expected finite numbers"),
            ("80.5", "True", "expected numbers"),
            ("80.5", '"80.5', "02_contrasts.csv is no table: "),
            ("low,high", "low,low", "line 1: expected the names of columns, each once"),
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
        with pytest.raises(ClaimsError, match=r"02_contrasts\.csv is no table"):
            claims.judge(self.claim, folder)

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"\x00" * 40, b"\n", b",,\n", b"\x89PNG\r\n\x1a\n"])
    def test_a_damaged_table_is_named(self, folder, content):
        (folder / self.path).write_bytes(content)
        with pytest.raises(ClaimsError, match=r"02_contrasts\.csv is no table"):
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
            ("work: paper", "work: book", "claim some-claim: work: input should be 'paper', 'slides' or 'checks'"),
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
        write_tables(LEDGER["memory-half-training"], HALF[0], tmp_path / "cpu")
        write_tables(LEDGER["alignment-kept-at-four-objects"], ERRORS[0], tmp_path / "cpu")
        names = "memory-half-training", "slides-fid-values", "alignment-kept-at-four-objects"
        return [claims.judge(LEDGER[name], tmp_path / "cpu") for name in names]

    def test_table(self, verdicts):
        works, checks = claims.as_table(verdicts).split("**Our checks: 1, of them 1 holds, 0 fails, 0 cannot tell.**")
        here = "60 % less at batch 1, measured (10 → 4 GB; 60 % on paper), 50 % at 16 on paper"
        assert f"| 50 % less | {here} | reproduced |" in works
        count = "Claims of the works: 2, of them 1 reproduced, 0 direction only, 0 not reproduced, 1 not testable here"
        assert works.startswith(f"**{count}.**")
        assert "| 1.05 (1.03 to 1.07) times the teacher's errors, margin 1.25 | holds |" in checks
        assert claims.summary(verdicts) == f"{count}; Our checks: 1, of them 1 holds, 0 fails, 0 cannot tell"

    def test_rows(self, verdicts):
        ruled, untested, check = claims.as_rows(verdicts)
        assert ruled.keys() == untested.keys() == check.keys()
        assert ruled["quantities"] == "before = 10; after = 4; paper_1 = 60; paper_16 = 50"
        assert check["quantities"] == "errors = 1.05 (1.029 to 1.071)"
        assert untested["here"] == untested["why"] == LEDGER["slides-fid-values"].not_testable

    def test_lines(self, verdicts):
        text = claims.as_text(verdicts)
        assert "memory-half-training: reproduced\n" in text and f"rule: {RULES['memory-half-training'].__doc__}" in text


def test_every_claim_that_a_figure_bears_on_is_in_the_ledger():
    known = {claim.id for claim in claims.load()}
    assert {claim for plot in FIGURES.values() for claim in plot.claims} <= known
