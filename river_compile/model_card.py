"""The README.md of a folder with a river model: what was made of what, how it is loaded, and what a tool cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from river_compile.config import RiverConfig
from river_compile.reports import ExportReport
from river_compile.version import __version__

__all__ = ["model_card"]

_LOADING = {
    "genai": """With ONNX Runtime GenAI (tried with 0.18{newer}):

```python
import onnxruntime_genai as og

model = og.Model("{folder}")
tokenizer = og.Tokenizer(model)
generator = og.Generator(model, og.GeneratorParams(model))
generator.append_tokens(tokenizer.encode("A lighthouse is"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```
""",
    "optimum": """With optimum (tried with optimum-onnx 0.1 and transformers 4.57):

```python
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

model = ORTModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
tokens = model.generate(**tokenizer("A lighthouse is", return_tensors="pt"), max_new_tokens=32)
print(tokenizer.decode(tokens[0]))
```
""",
}
_OWN = """With river-compile:

    river run {folder} --prompt "A lighthouse is"{option}

```python
from river_compile.runtime import OnnxDecoder

result = OnnxDecoder("{folder}/{model}").generate(prompts, max_new_tokens=32, {argument})
```
"""


def model_card(
    report: ExportReport,
    config: RiverConfig,
    kind: Literal["hf", "optimum", "genai"],
    folder: str,
    model: str,
) -> str:
    """Markdown, with the front matter that hubs read.

    Args:
        report: of the export, its notes included.
        config: what the river was made with.
        kind: of the folder that the model came from; one of Hugging Face becomes one of optimum.
        folder, model: names of the new folder and of the river's file in it.
    """
    tool = "genai" if kind == "genai" else "optimum"
    newer = " and later, which draft by `model.draft`" if config.exact and tool == "genai" else ""
    loading = _LOADING[tool].replace("{folder}", folder).replace("{newer}", newer)
    option, argument = (" --exact", "exact=True") if config.exact else (" --tau 0.95", "tau=0.95")
    own = _OWN.format(folder=folder, model=model, option=option, argument=argument)
    front = ["---", "library_name: onnx", "tags: [river-compile, early-exit, onnx]", "---"]
    lines = [*front, "", f"# {folder}", "", _what(report, config), "", *_table(report, config), "", loading, own]
    if report.notes:
        lines += ["Notes of the export:", "", *(f"- {note}" for note in report.notes), ""]
    return "\n".join(lines)


def _what(report: ExportReport, config: RiverConfig) -> str:
    # A folder's path says where it lay on one machine only; a hub name has one slash.
    path = Path(report.source)
    source = path.name if path.is_absolute() or len(path.parts) > 2 else report.source
    made = f"`{source}` with an exit river, made by river-compile {__version__} (River-LLM, arXiv 2604.18396): "
    if config.exact:
        return made + (
            "the river drafts tokens, and the original layers verify them. Where a runtime does not draft, the model "
            "computes what the original computes."
        )
    return made + (
        f"each decoder layer has a quantized twin, and a token whose state stopped turning takes the rest of its way "
        f"through the twins. Exits are decided at tau {config.tau:g}; above 1 there are none."
    )


def _table(report: ExportReport, config: RiverConfig) -> list[str]:
    rows = [
        ("decoder layers", f"{report.layers}, {report.river_layers} of them with a twin"),
        ("river", f"{report.quantizer}, {report.average_bits:.2f} bits on average, group size {config.group_size}"),
        ("LM head after an exit", "as it was" if config.head_bits == "float" else f"{config.head_bits} bits"),
        (
            "size",
            f"{report.backbone_bytes / 1e6:.0f} MB of original weights, {report.river_bytes / 1e6:.0f} MB of river",
        ),
        ("threshold", _threshold(config)),
    ]
    if report.agreement is not None:
        found = report.agreement
        rows.append(
            ("agreement", f"{found.top1:.1%} with the original, on {found.tokens} tokens, at tau {found.tau:g}")
        )
    return ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]


def _threshold(config: RiverConfig) -> str:
    if config.exact:
        return "none: the river only drafts"
    evidence = ", by a calibration (`river calibrate`), whose evidence is in the model's metadata"
    return f"tau {config.tau:g}, exits from depth {config.min_depth}" + (evidence if config.calibration else "")
