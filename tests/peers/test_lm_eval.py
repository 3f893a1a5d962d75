"""EleutherAI's harness: with exits off, and exact, a river model gets its own `hf` model's results on local tasks."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import river_compile
from river_compile import RiverConfig
from tests.peers.peer import Peer, save_model
from tests.words import save_word_tokenizer

ROOT = Path(__file__).parents[2]
LM_EVAL = Peer(
    "lm-eval",
    (
        "lm_eval==0.4.13",
        "onnxruntime==1.32.0",
        "onnx==1.23.2",
        "onnx-ir==1.1.0",
        "onnxscript==0.7.2",
        "onnx-graphsurgeon==0.6.1",
        "torch==2.13.0",
        "transformers==5.24.0",
        "accelerate==1.15.0",
        "click==8.5.1",
        "rich==15.0.0",
        "pytest==9.2.0",
    ),
)


def _command(work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hub"), "PYTHONPATH": str(ROOT)}
    command = [str(LM_EVAL.folder / "bin" / "python"), "-m", "river_compile", "lm-eval", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=work, env=environment, timeout=1500, check=False)


def _evaluated(work: Path, model: str, arguments: str) -> dict[str, Any]:
    """Results, the config told with them, and each sample's answers, of the two tasks."""
    out = work / f"out.{len(list(work.glob('out.*')))}"
    done = _command(
        work,
        *("--model", model, "--model_args", arguments, "--device", "cpu", "--batch_size", "1"),
        *("--tasks", "w_cloze,w_next", "--include_path", str(work / "tasks"), "--output_path", str(out)),
        "--log_samples",
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    told = json.loads(next(out.rglob("results*.json")).read_text())
    answers = [
        json.loads(line)["resps"]
        for file in sorted(out.rglob("samples*.jsonl"), key=lambda file: file.name.split("_20")[0])
        for line in file.read_text().splitlines()
    ]
    return {"results": told["results"], "config": told["config"], "answers": answers}


def _save_tasks(folder: Path) -> None:
    """The sample's tasks, in a random model's words."""
    folder.mkdir()
    rows = [{"text": f"w{i} w{i + 7} w{3 * i}", "choices": [f"w{i + 2}", f"w{i + 20} w{i + 4}"]} for i in range(4, 16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row | {"answer": 0}) + "\n" for row in rows))
    shared = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\ntest_split: test\n"
    (folder / "cloze.yaml").write_text(
        shared + "task: w_cloze\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\nmetric_list:\n  - metric: acc\n"
    )
    (folder / "next.yaml").write_text(
        shared + "task: w_next\noutput_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{choices[0]}}'\n"
        "generation_kwargs: {until: [' w9 '], max_gen_toks: 6, do_sample: false}\nmetric_list:\n"
        "  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )


def _likelihoods(told: dict[str, Any]) -> list[float]:
    return [float(choice[0][0]) for sample in told["answers"] for choice in sample if len(choice[0]) == 2]


def _texts(told: dict[str, Any]) -> list[str]:
    return [choice[0] for sample in told["answers"] for choice in sample if isinstance(choice[0], str)]


@pytest.mark.slow
def test_exits_off_and_exact_it_is_the_harnesss_own_hf_model(tmp_path: Path) -> None:
    LM_EVAL.made()
    source = save_word_tokenizer(save_model(tmp_path / "hf"))
    _save_tasks(tmp_path / "tasks")
    river_compile.export(source, tmp_path / "river", RiverConfig(tau=0.2))
    expected = _evaluated(tmp_path, "hf", f"pretrained={source}")
    assert len(_texts(expected)) == 12 and len(_likelihoods(expected)) == 24
    for arguments in (
        f"pretrained={source},tau=2",
        f"pretrained={source},exact=True",
        f"onnx={tmp_path / 'river'},tau=2,tokenizer={source}",
        f"onnx={tmp_path / 'river'},exact=True",
    ):
        found = _evaluated(tmp_path, "river", arguments)
        assert _texts(found) == _texts(expected), arguments
        assert _likelihoods(found) == pytest.approx(_likelihoods(expected), abs=2e-3), arguments
        assert found["results"]["w_cloze"]["acc,none"] == expected["results"]["w_cloze"]["acc,none"]
    for arguments in (f"pretrained={source},tau=0.2", f"onnx={tmp_path / 'river'}"):
        found = _evaluated(tmp_path, "river", arguments)
        assert found["config"]["mean_exit_depth"] < 4, arguments
        assert _likelihoods(found) != pytest.approx(_likelihoods(expected), abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ("tau=0.9", "error: pretrained: give either pretrained=FOLDER or onnx=FILE"),
        ("pretrained={hf},tua=0.9", "error: tua: no such option; there are "),
        ("pretrained={hf},tau=0.9,exact=True", "error: exact: a river that only drafts decides no exits"),
        ("onnx={hf}", "no river model is in it"),
        ("onnx={hf}/gone.onnx", "gone.onnx: no such file"),
        ("onnx={plain},tau=0.9,tokenizer={hf}", "has no river: make it with 'river export'"),
        ("onnx={plain}", "no tokenizer there"),
    ),
)
def test_wrong_arguments_are_one_line(tmp_path: Path, arguments: str, message: str) -> None:
    from tests.contrib_model import ContribDecoder

    LM_EVAL.made()
    source = save_word_tokenizer(save_model(tmp_path / "hf"))
    plain = ContribDecoder().save(tmp_path / "plain.onnx")
    _save_tasks(tmp_path / "tasks")
    given = arguments.format(hf=source, plain=plain)
    options = ("--tasks", "w_cloze", "--include_path", str(tmp_path / "tasks"))
    done = _command(tmp_path, "--model", "river", "--model_args", given, *options)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


_LIBRARY = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from river_compile.measure.harness import RiverLM
folder, onnx = sys.argv[1:]
def generated(model, until):
    settings = {"until": until, "max_gen_toks": 8}
    asked = [("w5 w9", settings), ("w40 w3", settings)]
    return model.generate_until([Instance("generate_until", {}, one, place) for place, one in enumerate(asked)])
def likelihood(model):
    return model.loglikelihood([Instance("loglikelihood", {}, ("w5 w9 w17", " w33 w4"), 0)])[0][0]
hf = HFLM(folder, dtype="float32", device="cpu", batch_size=2)
stop = generated(hf, [])[0].split()[2]
batched = RiverLM(pretrained=folder, dtype="float32", exact=True, batch_size=2)
print(json.dumps({
    "batched": [generated(hf, [stop]), generated(batched, [stop])],
    "likelihood": [likelihood(hf), likelihood(RiverLM(onnx=onnx, tokenizer=folder, exact=True))],
}))
"""


@pytest.mark.slow
def test_exact_is_hfs_in_batches_and_whatever_depth_limit_the_file_has(tmp_path: Path) -> None:
    LM_EVAL.made()
    source = save_word_tokenizer(save_model(tmp_path / "hf"))
    river_compile.export(source, tmp_path / "river", RiverConfig(tau=0.2, max_depth=0))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [str(LM_EVAL.folder / "bin" / "python"), "-c", _LIBRARY, str(source), str(tmp_path / "river")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["batched"][1] == told["batched"][0]
    assert told["likelihood"][1] == pytest.approx(told["likelihood"][0], abs=2e-3)
