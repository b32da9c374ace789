"""Widths are switched without a trace, drawn as asked, and never under somebody who is computing."""

import asyncio
import contextvars
import copy
import math
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_qguard.precision import BitMap, PrecisionError, bits, nest, random_bits, set_bits, set_random_bits, switch
from optimum_qguard.precision.nested import nested_layers
from optimum_qguard.precision.widths import KEPT_DRAWS

PROMPT = torch.arange(3, 11)[None]
NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 2}


@pytest.fixture(scope="module")
def shared() -> PreTrainedModel:
    model = tiny_model("llama")
    # Sharper predictions, so that widths differ in the tokens they choose.
    model.lm_head.weight.data *= 20
    return nest(model)


@pytest.fixture
def model(shared: PreTrainedModel) -> Iterator[PreTrainedModel]:
    yield shared
    set_bits(shared, 8)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(PROMPT).logits


def at(model: PreTrainedModel, width: int, function: Callable[[PreTrainedModel], Tensor]) -> Tensor:
    with bits(model, width):
        return function(model)


def widths(model: nn.Module) -> set[int]:
    return {layer.bits for layer in nested_layers(model).values()}


def test_switching_leaves_no_trace(model: PreTrainedModel) -> None:
    state = copy.deepcopy(model.state_dict())
    before = logits(model)
    set_bits(model, 3)
    assert not torch.equal(logits(model), before)
    set_bits(model, 8)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_bits_for_a_while(model: PreTrainedModel) -> None:
    set_bits(model, 6)
    with bits(model, 4):
        with bits(model, 2):
            assert widths(model) == {2}
        assert widths(model) == {4}
    assert widths(model) == {6}
    with pytest.raises(ZeroDivisionError), bits(model, 4):
        1 / 0  # noqa: B018
    assert widths(model) == {6}


def test_bit_map(model: PreTrainedModel) -> None:
    set_bits(model, BitMap({"*.down_proj": 8, "layers.1": 4, "*": 6}))
    found = {name: layer.bits for name, layer in nested_layers(model).items()}
    assert found["model.layers.1.mlp.down_proj"] == 8
    assert found["model.layers.1.self_attn.q_proj"] == 4
    assert found["model.layers.0.self_attn.q_proj"] == 6
    with bits(model, {"layers.0": 2}):
        assert nested_layers(model)["model.layers.0.self_attn.q_proj"].bits == 2
        assert nested_layers(model)["model.layers.1.self_attn.q_proj"].bits == 4


def test_part_of_a_model(model: PreTrainedModel) -> None:
    set_bits(model.model.layers[0], 3)
    assert widths(model.model.layers[0]) == {3}
    assert widths(model.model.layers[1]) == {8}


def test_each_forward_draws(model: PreTrainedModel) -> None:
    with random_bits(model, (2, 8), seed=0) as draws:
        for _ in range(12):
            drawn_before = len(draws)
            result = logits(model)
            assert len(draws) == drawn_before + 1
            assert torch.equal(result, at(model, draws[-1], logits))
    assert set(draws) == {2, 8}
    assert widths(model) == {8}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}, {"do_sample": True}], ids=str)
def test_generate_draws_for_each_token(model: PreTrainedModel, options: dict[str, Any]) -> None:
    with random_bits(model) as draws:
        model.generate(PROMPT.repeat(2, 1), **{**NEW, **options})
    assert len(draws) == 6
    assert set(draws) <= {4, 6, 8}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_a_request_keeps_its_width(model: PreTrainedModel, options: dict[str, Any]) -> None:
    def generate(model: PreTrainedModel) -> Tensor:
        return model.generate(PROMPT.repeat(2, 1), **NEW, **options)

    with random_bits(model, (2, 3, 8), per="request") as draws:
        results = [generate(model) for _ in range(8)]
    assert len(draws) == 8
    for result, width in zip(results, draws, strict=True):
        assert torch.equal(result, at(model, width, generate))


def test_a_forward_outside_of_generate_is_a_request(model: PreTrainedModel) -> None:
    with random_bits(model, per="request") as draws:
        for _ in range(3):
            logits(model)
    assert len(draws) == 3


def test_an_inner_model_draws_once_for_a_forward(model: PreTrainedModel) -> None:
    with random_bits(model) as draws:
        model.model(PROMPT)
    assert len(draws) == 1


def test_encoder_and_decoder_of_a_request() -> None:
    model = nest(tiny_model("t5", decoder_start_token_id=0))
    with random_bits(model, per="request") as draws:
        model.generate(PROMPT, **NEW)
    assert len(draws) == 1
    with random_bits(model) as draws:
        model.generate(PROMPT, **NEW)
    assert len(draws) == 1 + 6


def test_pipeline(model: PreTrainedModel, tmp_path: Any) -> None:
    from tiny_models import save_tokenizer
    from transformers import pipeline

    generator = pipeline("text-generation", model=model, tokenizer=save_tokenizer(tmp_path), device="cpu")
    with random_bits(model, per="request") as draws:
        generator(["w3 w4", "w5 w6"], max_new_tokens=3)
    assert len(draws) == 2


def test_after_an_error_a_forward_draws_again(model: PreTrainedModel) -> None:
    with random_bits(model) as draws:
        with pytest.raises(ValueError, match="input_ids"):
            model()
        logits(model)
    assert len(draws) == 2


def test_draws_are_uniform(model: PreTrainedModel) -> None:
    """From the operating system; four sigma leave one run in 16,000 to fail, for each of three counts."""
    layer = nested_layers(model)["model.layers.0.self_attn.q_proj"]
    with random_bits(model) as draws:
        for _ in range(9000):
            layer.bits  # noqa: B018
    for count in Counter(draws).values():
        assert abs(count - 3000) < 4 * math.sqrt(9000 * 2 / 9)


def test_a_seed_repeats_and_the_system_does_not(model: PreTrainedModel) -> None:
    def draw(seed: int | None) -> list[int]:
        with random_bits(model, seed=seed) as draws:
            for _ in range(100):
                nested_layers(model)["model.layers.0.self_attn.q_proj"].bits  # noqa: B018
        return draws

    assert draw(7) == draw(7)
    torch.manual_seed(0)
    first = draw(None)
    torch.manual_seed(0)
    assert first != draw(None)


def test_two_threads_at_different_widths(model: PreTrainedModel) -> None:
    def generate(width: int) -> list[Tensor]:
        with bits(model, width):
            return [model.generate(PROMPT, **NEW, output_logits=True, return_dict_in_generate=True) for _ in range(4)]

    alone = {width: generate(width)[0] for width in (2, 3, 8)}
    with ThreadPoolExecutor(3) as threads:
        together = dict(zip(alone, threads.map(generate, alone), strict=True))
    for width, results in together.items():
        for result in results:
            assert torch.equal(result.sequences, alone[width].sequences)
            assert torch.equal(torch.stack(result.logits), torch.stack(alone[width].logits))


def test_a_request_that_runs_is_not_switched(model: PreTrainedModel) -> None:
    """Another thread sets another width between two tokens."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Switching(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            thread = threading.Thread(target=set_bits, args=(model, 2))
            thread.start()
            thread.join()
            return scores

    expected = at(model, 8, lambda model: model.generate(PROMPT, **NEW))
    result = model.generate(PROMPT, **NEW, logits_processor=LogitsProcessorList([Switching()]))
    assert torch.equal(result, expected)
    assert widths(model) == {2}


def test_threads_do_not_inherit_unless_they_are_given_the_context(model: PreTrainedModel) -> None:
    found = []
    with bits(model, 4):
        context = contextvars.copy_context()
        for run in (lambda: found.append(widths(model)), lambda: context.run(lambda: found.append(widths(model)))):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
    assert found == [{8}, {4}]


def test_tasks_have_widths_of_their_own(model: PreTrainedModel) -> None:
    """Two tasks of one thread take turns between forwards."""

    async def ask(width: int) -> list[Tensor]:
        results = []
        with bits(model, width):
            for _ in range(3):
                results.append(logits(model))
                await asyncio.sleep(0)
        return results

    async def ask_both() -> list[list[Tensor]]:
        return await asyncio.gather(ask(2), ask(8))

    for width, results in zip((2, 8), asyncio.run(ask_both()), strict=True):
        assert all(torch.equal(result, at(model, width, logits)) for result in results)


def test_every_forward_has_one_width_while_another_thread_switches(model: PreTrainedModel) -> None:
    """Layers of one forward never compute at different widths."""
    expected = {width: at(model, width, logits) for width in (2, 8)}
    done = threading.Event()

    def switch() -> None:
        while not done.is_set():
            for width in expected:
                set_bits(model, width)

    thread = threading.Thread(target=switch)
    thread.start()
    try:
        for _ in range(40):
            result = logits(model)
            assert any(torch.equal(result, each) for each in expected.values())
    finally:
        done.set()
        thread.join()


def test_two_threads_set_two_parts(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that comes second keeps what the first has set, however their steps fall."""
    completed, began, ended = switch._completed, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        found = completed(*arguments)
        if not began.is_set():
            began.set()
            ended.wait(0.3)
        return found

    monkeypatch.setattr(switch, "_completed", slow)
    first, second = (model.get_submodule(f"model.layers.{index}") for index in (0, 1))
    thread = threading.Thread(target=set_bits, args=(first, 3))
    thread.start()
    began.wait()
    set_bits(second, 5)
    ended.set()
    thread.join()
    assert (widths(first), widths(second)) == ({3}, {5})


def test_what_was_drawn_is_not_kept_for_ever(model: PreTrainedModel) -> None:
    draws = set_random_bits(model, (4, 6))
    layer = nested_layers(model)["model.layers.0.self_attn.q_proj"]
    for _ in range(KEPT_DRAWS + 5):
        layer.bits  # noqa: B018
    assert len(draws) == KEPT_DRAWS


def test_random_everywhere(model: PreTrainedModel) -> None:
    draws = set_random_bits(model, (4, 6), per="request")
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: model.generate(PROMPT, **NEW), range(4)))
    assert len(draws) == 4
    twin = copy.deepcopy(model)
    set_bits(twin, 8)
    with pytest.raises(PrecisionError, match="has a random width, which it cannot keep"):
        set_bits(model, {"*.down_proj": 8})
    set_bits(model, 4)
    assert widths(model) == {4}


def test_embedding_gradients_at_drawn_widths(model: PreTrainedModel) -> None:
    embeddings = model.get_input_embeddings()(PROMPT).detach().requires_grad_()
    with random_bits(model, (2,)):
        loss = model(inputs_embeds=embeddings).logits.logsumexp(-1).sum()
    (outside,) = torch.autograd.grad(loss, embeddings)
    with bits(model, 2):
        (inside,) = torch.autograd.grad(model(inputs_embeds=embeddings).logits.logsumexp(-1).sum(), embeddings)
    assert torch.equal(outside, inside)


def test_gradient_checkpointing_is_refused() -> None:
    model = nest(tiny_model("llama"))
    model.gradient_checkpointing_enable()
    logits(model)
    model.train()
    with pytest.raises(PrecisionError, match="gradient_checkpointing_disable"):
        model(PROMPT)


@pytest.mark.parametrize("width", [1, 9, 0, True, -4])
def test_width_out_of_range(model: PreTrainedModel, width: int) -> None:
    for function in (set_bits, lambda model, width: bits(model, width).__enter__()):
        with pytest.raises(PrecisionError, match="a width is a whole number from 2 to 8"):
            function(model, width)
    with pytest.raises(PrecisionError, match="a width is a whole number from 2 to 8"):
        set_random_bits(model, (8, width))


def test_bad_input(model: PreTrainedModel) -> None:
    with pytest.raises(PrecisionError, match="'nope' matches no nested layer"):
        set_bits(model, {"nope": 4})
    with pytest.raises(PrecisionError, match="'lm_head' matches no nested layer"):
        set_bits(model, {"lm_head": 4})
    with pytest.raises(PrecisionError, match="no full precision to go to"):
        set_bits(model, BitMap({"*": None}))
    with pytest.raises(PrecisionError, match=r"widths is 4; give several to draw from, such as \(4, 6, 8\)"):
        set_random_bits(model, 4)  # type: ignore[arg-type]
    with pytest.raises(PrecisionError, match="no widths to draw from"):
        set_random_bits(model, ())
    with pytest.raises(PrecisionError, match="per is 'token'; choose 'forward' or 'request'"):
        set_random_bits(model, per="token")
    for function in (set_bits, lambda model, _: set_random_bits(model)):
        with pytest.raises(PrecisionError, match="no nested layers to switch; call nest"):
            function(tiny_model("llama"), 4)


def test_the_default_draws_from_the_operating_system(model: PreTrainedModel) -> None:
    set_random_bits(model)
    layer = nested_layers(model)["model.layers.0.self_attn.q_proj"]
    assert isinstance(layer.switch.policy().generator, secrets.SystemRandom)
