"""What an attacker may change, and that what is scored is what the model says to it."""

from functools import partial

import pytest
import torch
from conftest import byte_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.generation import generate_answers, generate_from_embeddings
from optimum_qguard.evaluate.robustness import (
    Batch,
    Robustness,
    answer_scores,
    attack_questions,
    clean_prompts,
    encode_questions,
    flips,
    pgd,
    robustness,
)
from optimum_qguard.evaluate.squad import Passage, squad

PASSAGES = [
    Passage("GREEN tea from UJI; black TEA from Ilam.", "kyoto?", ("UJI", "Uji")),
    Passage("A lake is CALLED Pfuhl here", "where?", ("Pfuhl",)),
    Passage("XY, ZW & QV. QV!", "ab", ("QV",)),
]


def test_what_may_change_is_the_passage_without_answer_and_question(tokenizer: PreTrainedTokenizerFast) -> None:
    for question, passage in zip(encode_questions(tokenizer, PASSAGES), PASSAGES, strict=True):
        assert list(question.prompt) == tokenizer(passage.prompt)["input_ids"]
        letters = "".join(
            character if free else "_" for character, free in zip(passage.prompt, question.free, strict=True)
        )
        expected = passage.context
        for answer in passage.answers:
            expected = expected.replace(answer, "_" * len(answer))
        expected = "".join("_" if character in passage.question + " " else character for character in expected)
        assert letters.rstrip("_") == expected.rstrip("_")
        assert tokenizer.decode(question.answer) == f" {passage.answers[0]}"
        assert question.barred == set(tokenizer(" " + passage.question + "".join(passage.answers))["input_ids"])


def test_in_a_chat_too(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    (question,) = encode_questions(chat_tokenizer, PASSAGES[:1])
    chat = [{"role": "user", "content": PASSAGES[0].prompt}]
    expected = chat_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(question.prompt) == expected
    free = [token for token, free in zip(question.prompt, question.free, strict=True) if free]
    assert chat_tokenizer.decode(free) == "GREENeafrm;blacTEAfrmIlam."
    assert chat_tokenizer.decode(question.answer) == "UJI", "the assistant's turn begins with it"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_embeddings_are_answered_as_their_tokens(architecture: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = byte_model(0)
    if architecture == "gpt2":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = GPT2LMHeadModel(
                GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5, eos_token_id=256)
            )
    prompts = ["one", "a longer prompt", "x", "and another one"]
    embed = model.get_input_embeddings()
    embeddings = [embed(torch.tensor(tokenizer(prompt)["input_ids"])).detach() for prompt in prompts]
    expected = generate_answers(model, tokenizer, prompts, max_new_tokens=8)
    for batch_size in (1, 3):
        found = generate_from_embeddings(model, tokenizer, embeddings, max_new_tokens=8, batch_size=batch_size)
        assert found == expected
    for bad in ([], [torch.zeros(0, 32)]):
        with pytest.raises(EvaluationError, match="no prompts"):
            generate_from_embeddings(model, tokenizer, bad)
    with pytest.raises(EvaluationError, match="at least 1"):
        generate_from_embeddings(model, tokenizer, embeddings, max_new_tokens=0)


def test_attacks_leave_everything_else_alone(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    questions = encode_questions(tokenizer, PASSAGES)
    clean = clean_prompts(model, questions)
    table = model.get_input_embeddings().weight.detach()
    for attack in (pgd(epsilon=0.5, steps=2), flips(flips=4, tries=2)):
        together = attack_questions(model, tokenizer, questions, attack, batch_size=2)
        for question, before, after in zip(questions, clean, together, strict=True):
            changed = (before != after).any(-1)
            assert not (changed & ~torch.tensor(question.free)).any()
        assert any(not torch.equal(before, after) for before, after in zip(clean, together, strict=True))
    for question, before, after in zip(questions, clean, together, strict=True):
        tokens = torch.cdist(after, table).argmin(-1)
        assert torch.equal(table[tokens], after), "flips are tokens"
        put_in = tokens[(before != after).any(-1)].tolist()
        assert len(put_in) <= 4
        assert not question.barred & set(put_in)
        assert 256 not in put_in, "special tokens are not put in"


def test_what_may_be_put_in(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    batches: list[Batch] = []

    def look(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
        batches.append(batch)
        return model.get_input_embeddings()(batch.input_ids).detach()

    questions = encode_questions(tokenizer, PASSAGES)
    attack_questions(model, tokenizer, questions, look, batch_size=2)
    assert [len(batch.input_ids) for batch in batches] == [2, 1]
    candidates = torch.cat([batch.candidates for batch in batches])
    for question, allowed in zip(questions, candidates, strict=True):
        assert set((~allowed).nonzero()[:, 0].tolist()) == {*question.barred, tokenizer.eos_token_id}


def test_scores_of_a_model_under_attack(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [passage.prompt for passage in PASSAGES]
    said = [answer.text.strip() for answer in generate_answers(model, tokenizer, prompts, max_new_tokens=6)]
    passages = [Passage(each.context, each.question, (*each.answers, text.split("\n")[0]))
                for each, text in zip(PASSAGES, said, strict=True)]  # fmt: skip
    measure = partial(robustness, model, tokenizer, passages, max_new_tokens=6, batch_size=2)
    found = measure(pgd(epsilon=1.0, steps=5))
    assert found.clean.tolist() == [1, 1, 1]
    assert float(found.clean.mean()) == squad(model, tokenizer, passages, max_new_tokens=6).f1
    assert found.exact_match[0] == 1
    assert found.groups.tolist() == [0, 0, 1]
    nothing = measure(pgd(epsilon=0.0, steps=1))
    assert torch.equal(nothing.adversarial, nothing.clean)
    assert nothing.delta.estimate == 0
    assert float(found.adversarial.mean()) < 1, "a random model is easily moved"
    surrogate, attack = byte_model(1), flips(flips=5)
    surrogate.set_input_embeddings(model.get_input_embeddings())
    questions = encode_questions(tokenizer, passages)
    attacked = attack_questions(surrogate, tokenizer, questions, attack)
    expected, _ = answer_scores(model, tokenizer, questions, attacked, max_new_tokens=6)
    assert torch.equal(measure(attack, surrogate=surrogate).adversarial, expected)


def test_success_is_half_of_the_clean_f1_lost_where_there_was_one() -> None:
    clean = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.4, 0.0])
    adversarial = torch.tensor([0.5, 0.4, 0.2, 0.5, 0.0, 0.0])
    found = Robustness(clean, adversarial, (0.0, 0.0), torch.arange(6))
    assert found.success_rate.estimate == pytest.approx(2 / 4)
    assert found.clean_f1.estimate == pytest.approx(3.4 / 6)
    assert found.adversarial_f1.estimate == pytest.approx(1.6 / 6)
    assert found.delta.estimate == pytest.approx(-1.8 / 6)
    assert found.delta.low <= found.delta.estimate <= found.delta.high


def test_bad_input(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(EvaluationError, match="at least one"):
        encode_questions(tokenizer, [])
    with pytest.raises(EvaluationError, match="nothing to attack"):
        encode_questions(tokenizer, [Passage("Uji", "tea?", ("Uji",))])
