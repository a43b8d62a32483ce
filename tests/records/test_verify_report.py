"""A verification's report: what it holds, and files that are none."""

import pytest

from adapmoe_lab.records import RecordError
from adapmoe_lab.records.verify_report import Check, VerifyReport

CHECKS = (
    Check("exactness", "failed", "far off", "1e-5", {"errors": [1.0, None]}),
    Check("speed", "measured", "12 ms"),
)


def test_a_report_survives_its_file(tmp_path):
    report = VerifyReport(CHECKS, {"versions": {"torch": "2"}})
    kept = VerifyReport.load(report.save(tmp_path / "verify.json"))
    assert kept == report
    assert kept.failed == ("exactness",)
    assert kept["exactness"].values["errors"] == [1.0, None]
    assert kept.table().splitlines()[2:] == [
        "| exactness | failed | far off | 1e-5 |",
        "| speed | measured | 12 ms | none |",
    ]


def test_what_is_not_finite_is_refused_and_leaves_no_file(tmp_path):
    report = VerifyReport((Check("speed", "measured", "", values={"s": float("nan")}),), {})
    with pytest.raises(RecordError, match=r"checks\[0\]\.values\.s is nan"):
        report.save(tmp_path / "verify.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind": "verify-', r"is not a complete JSON file .* Verify again"),
        ("[]", "holds a list where named values are expected"),
        ('{"kind": "x"}', "holds a 'x'; expected a 'verify-report'"),
        ('{"kind": "verify-report", "schema_version": 2}', "has schema version 2; .* version 1"),
        ('{"kind": "verify-report", "schema_version": 1}', "lacks 'conditions', 'checks'"),
        (
            '{"kind": "verify-report", "schema_version": 1, "conditions": {}, "checks": 5}',
            "has a part of the wrong form: TypeError",
        ),
        (
            '{"kind": "verify-report", "schema_version": 1, "conditions": {}, "checks": [{}]}',
            "check 0, lacks 'name', 'verdict'",
        ),
    ],
)
def test_a_file_that_is_no_report_is_refused(tmp_path, content, message):
    path = tmp_path / "verify.json"
    path.write_text(content)
    with pytest.raises(RecordError, match=message):
        VerifyReport.load(path)


def test_a_missing_report_and_an_unknown_verdict_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No verify-report at .*; give a file that"):
        VerifyReport.load(tmp_path / "none.json")
    with pytest.raises(RecordError, match="check 'speed' is 'fine'; expected one of passed, fail"):
        Check("speed", "fine", "")
