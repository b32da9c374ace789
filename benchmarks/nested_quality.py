"""How good the widths of one nested copy are: against quantizing the weights to each width directly, on a real model.

Group sizes are the same everywhere. Direct quantization is from the least to the greatest weight of a group, rounded to
the nearest point; and symmetric, as most libraries do it.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from harness import RESULTS, Row, argument_parser, print_table, write
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from optimum_qguard.evaluate import smollm2_path, standard_library_text
from optimum_qguard.evaluate.loading import load_tokenizer
from optimum_qguard.evaluate.perplexity import next_token_logits, perplexity_and_kl
from optimum_qguard.precision import BitMap, bits, nest
from optimum_qguard.precision.bitmap import WIDTHS
from optimum_qguard.precision.decoding import decoded
from optimum_qguard.precision.nested import nested_layers

WINDOW, STRIDE = 512, 256
_CHARACTERS_PER_TOKEN = 8


def main() -> None:
    """Measure, print and write."""
    parser = argument_parser(__doc__, RESULTS / "nested_quality.json")
    parser.add_argument("--model", default=None, help="folder or Hub id; by default SmolLM2, off the Q4_1 grid")
    parser.add_argument("--tokens", type=int, default=512, help="of the text that predictions are compared on")
    parser.add_argument("--group-size", type=int, default=96, help="weights that share a grid; it divides every row")
    disable_progress_bar()
    arguments = parser.parse_args()
    rows = measure(arguments)
    write("nested_quality", rows, arguments.output)
    print_table(rows)


def measure(arguments: argparse.Namespace) -> list[Row]:
    """A row for each width."""
    folder = arguments.model or smollm2_path(off_grid=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(arguments.device).eval()
    text = (load_tokenizer(folder), standard_library_text(_CHARACTERS_PER_TOKEN * arguments.tokens))
    options: dict[str, Any] = {"window": WINDOW, "stride": STRIDE, "max_tokens": arguments.tokens}
    reference = next_token_logits(model, *text, **options)
    full = perplexity_and_kl(reference, model, *text, **options).perplexity
    nested = nest(copy.deepcopy(model), group_size=arguments.group_size)
    uncorrected = copy.deepcopy(nested)
    for layer in nested_layers(uncorrected).values():
        layer.line.zero_()
    rows: list[Row] = []
    for width in tqdm(WIDTHS[::-1], desc="Widths", leave=False):
        quality = {}
        for name, each in (("nested", nested), ("nested, no lines", uncorrected)):
            with bits(each, width):
                quality[name] = perplexity_and_kl(reference, each, *text, **options)
        for name, mapping in (("direct", "asymmetric"), ("symmetric", "symmetric")):
            widths = BitMap({"*": width}).resolve(model)
            with decoded(model, widths, group_size=arguments.group_size, mapping=mapping):  # type: ignore[arg-type]
                quality[name] = perplexity_and_kl(reference, model, *text, **options)
        rows.append(
            {
                "bits": width,
                "group size": arguments.group_size,
                "tokens": arguments.tokens,
                **{f"{name} KL": each.kl for name, each in quality.items()},
                "nested KL / direct KL": quality["nested"].kl / quality["direct"].kl,
                "full perplexity": full,
                "nested perplexity": quality["nested"].perplexity,
                "direct perplexity": quality["direct"].perplexity,
            }
        )
    return rows


if __name__ == "__main__":
    main()
