"""Where the thinking begins and ends while a plan runs: tags in several tokens, several ends, prompts of every kind."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.inference.baselines import baseline, think_or_not
from neureasoner.inference.baselines.think_or_not import CLOSE, OPTION_STUB
from neureasoner.inference.controller import Controller
from neureasoner.inference.plan import Action, Plan, Rule, Strength, Trigger
from neureasoner.inference.rows import RowState
from neureasoner.inference.steered import SteeredModel
from neureasoner.inference.steering import Steering, SteeringRun
from neureasoner.steps import Separators, StepSegmenter, segment
from neureasoner.traces import NO_THINKING

_spec = importlib.util.spec_from_file_location("thinking_by_hand", Path(__file__).parent / "by_hand.py")
assert _spec and _spec.loader
by_hand: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(by_hand)

TAG = "</think>"
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(7))
DENSE = Direction({"residual:0": VECTOR}, "positive = test")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def spelling_tokenizer(*pieces: str) -> Any:
    """Byte-level, no token for a tag: single bytes and ``pieces``. ``<eos>`` is its EOS, ``<eot>`` another end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = ["<eos>", "<eot>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(vocab)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module")
def speller() -> Any:
    return spelling_tokenizer("ĊĊ", ".</", "ĊĊ<", "think", "nk>ĊĊ", "</th", ">.", "a</think>")


@pytest.fixture(scope="module")
def qwen3_like(tokenizer: Any) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = CHATML
    return changed


def encode(tokenizer: Any, text: str) -> list[int]:
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]


@pytest.mark.parametrize("seed", range(3))
def test_the_device_follows_the_segmenter(make_model: Callable[..., Any], speller: Any, seed: int) -> None:
    """Boundaries and both phases, row by row and token by token, in a batch that loses rows on the way."""
    model = make_model(vocab_size=len(speller) + 4, eos_token_id=0, pad_token_id=0)
    places = {"boundary": "residual:0", "think": "residual:1", "answer": "attn_out:0"}
    when: dict[str, Any] = {n: {"decode": True, "phase": n} for n in places} | {"boundary": {"boundary": True}}
    plan = Plan("t", tuple(by_hand.rule({"add": True}, when[n], name=n, site=(at,)) for n, at in places.items()))
    dense = Direction(dict.fromkeys(places.values(), VECTOR), "positive = test")
    steering, ends = Steering(model, speller, plan, {"d": dense}), [0, 1]
    rng = np.random.default_rng(seed)
    pieces = [*(speller.get_vocab()[c] for c in "a.Ċ</think>"), *range(len(speller) - 8, len(speller) + 2)]
    draws = [rng.choice(pieces, size=60).tolist() for _ in range(8)]
    for i, text in enumerate(["a\n\nb.</think>c\n\n", "\n\n</think", "a.\n\n</th</think>"]):
        draws[i][20:20] = encode(speller, text)
    draws[3][30], draws[4][25] = 0, 1
    draws[5][:45] = [speller.get_vocab()[c] for c in "a" * 37 + TAG]  # rows leave while the tag is being written
    rows = [RowState(i, StepSegmenter(Separators.of(speller), i != 7, ends), speller) for i in range(len(draws))]
    run, live = SteeringRun(steering, rows), list(range(len(rows)))
    run.prefill = False
    closings = answers = 0
    for t in range(60):
        if t == 40:
            live = [0, 2, 3, 5, 7]
            run.narrow(torch.tensor(live), torch.tensor(live))
        run.read_ids(torch.tensor([[draws[i][t]] for i in live]))
        on = {n: run._doses[n].on.tolist() for n in places}
        for place, i in enumerate(live):
            segmenter = rows[i].segmenter
            closed = segmenter.push(draws[i][t])
            assert on["boundary"][place] == closed and on["answer"][place] != on["think"][place]
            assert on["think"][place] == segmenter.in_thinking
            closings, answers = closings + closed, answers + on["answer"][place]
    assert closings > 4 and answers > 20
    for i in live:
        text = speller.decode(draws[i][:60])
        assert rows[i].segmenter.in_thinking == (i != 7 and TAG not in text and not {0, 1} & set(draws[i][:60]))


def test_a_rule_of_the_answer_acts_behind_a_spelled_tag(make_model: Callable[..., Any], speller: Any) -> None:
    """Against an own loop that looks for the tag in the text."""
    model = make_model(vocab_size=len(speller), eos_token_id=0, pad_token_id=0)
    close = Rule("close", Trigger(always=True, immediate=True, min_tokens=6), Action(force="</think>"))
    act = by_hand.rule({"add": True}, {"decode": True, "phase": "answer"}, site=("residual:0",), strength=Strength(1.5))
    steered = SteeredModel(model, speller, Plan("t", (close, act)), directions={"d": DENSE})
    prompt, forced, ids = encode(speller, "Say it: "), encode(speller, TAG), []
    assert len(forced) > 1

    def edit(h: torch.Tensor, _: torch.Tensor, prefill: bool) -> torch.Tensor:
        if TAG in speller.decode(ids):
            h[:, -1] += 1.5 * VECTOR
        return h

    handles = by_hand.install(model, {("residual", 0): edit})
    with torch.no_grad():
        cache, given = None, torch.tensor([prompt])
        for n in range(30):
            out = model(given, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            ids.append(forced[n - 6] if 6 <= n < 6 + len(forced) else int(out.logits[0, -1].argmax()))
            if ids[-1] == 0:
                break
            given = torch.tensor([[ids[-1]]])
    for handle in handles:
        handle.remove()
    [g] = steered.generate([prompt], max_new_tokens=30, temperature=0)
    assert g.response_ids == ids and g.thinking_tokens == 6 and len(ids) > 16
    assert [(e["rule"], e["token"]) for e in g.events] == [("close", 6), ("r", 6 + len(forced))]
    [plain] = SteeredModel(model, speller, Plan("t", (close,))).generate([prompt], max_new_tokens=30, temperature=0)
    assert plain.response_ids != g.response_ids


@pytest.mark.parametrize("ended", ["One.\n\nTwo.\n</think>\n\n", "One.\n</think>\n\nThe answer"])
def test_no_second_tag_is_forced_behind_a_thinking_that_has_ended(
    make_model: Callable[..., Any], speller: Any, ended: str
) -> None:
    model = make_model(vocab_size=len(speller), eos_token_id=0, pad_token_id=0)
    text = speller.apply_chat_template(
        [{"role": "user", "content": "Write <think>."}], add_generation_prompt=True, tokenize=False
    )
    prompts = [encode(speller, text + "<think>\n" + ended), encode(speller, text + "<think>\nOne.\n\n")]
    closed, opened = baseline("thinking_budget", model, speller, tokens=5).generate(
        prompts, max_new_tokens=24, temperature=0
    )
    assert not closed.events and not closed.steps and closed.thinking_tokens == 0
    assert [e["token"] for e in opened.events] == [5] and opened.text.count(TAG) == 1


def test_an_unspellable_tag_is_refused(make_model: Callable[..., Any], speller: Any) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(("[UNK]", "a", "\n\n"))}, "[UNK]"))
    lacking = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[UNK]")
    plan = Plan("t", (by_hand.rule({"add": True}, {"decode": True, "phase": "answer"}, site=("residual:0",)),))
    with pytest.raises(UserError, match=r"rule r: .*</think>"):
        Controller(make_model(), lacking, plan, directions={"d": DENSE})
    Controller(make_model(), speller, plan, directions={"d": DENSE})


def prompts_of(tokenizer: Any) -> list[list[int]]:
    """Three prompts of one template: nothing opened, opened, closed; each question speaks of tags."""
    asked = [{"role": "user", "content": "What is </think>, or <think>\n? 3"}]
    how: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
    plain = tokenizer.apply_chat_template(asked, **how)
    texts = [plain, plain + "<think>\n", tokenizer.apply_chat_template(asked, enable_thinking=False, **how)]
    return [encode(tokenizer, t) for t in texts]


@pytest.mark.parametrize("which", ["qwen3_like", "speller"])
def test_a_start_rule_closes_what_is_open_and_opens_what_is_not(
    make_model: Callable[..., Any], which: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(which)
    model = make_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    steered = baseline("no_thinking", model, tokenizer)
    out = steered.generate(prompts_of(tokenizer), max_new_tokens=90, temperature=0)
    wanted = ["<think>\n" + NO_THINKING, NO_THINKING, ""]
    for g, text in zip(out, wanted, strict=True):
        n = len(encode(tokenizer, text)) if text else 0
        assert tokenizer.decode(g.response_ids[:n]) == text and g.forced == [True] * n + [False] * (len(g.forced) - n)
        [event] = g.events
        assert event["suppressed"] is (not text) and event["action"] == (text or NO_THINKING)
        assert TAG in text or g.thinking_tokens == 0
    plain = SteeredModel(model, tokenizer, Plan("none"))
    for nothinking, g in zip(
        plain.generate(prompts_of(tokenizer), max_new_tokens=30, nothinking=True), out, strict=True
    ):
        n = sum(g.forced)
        assert nothinking.prompt_ids == g.prompt_ids + g.response_ids[:n] and nothinking.thinking_tokens == 0


def test_texts_that_open_for_themselves_or_close_nothing_are_forced_as_they_are(
    make_model: Callable[..., Any], qwen3_like: Any
) -> None:
    model = make_model()
    for text in ("<think>\n\n</think>\n\n", "Okay.\n\n"):
        plan = Plan("t", (Rule("r", Trigger(start=True), Action(force=text)),))
        out = SteeredModel(model, qwen3_like, plan).generate(prompts_of(qwen3_like), max_new_tokens=20, temperature=0)
        forced = [g.text for g in out if g.forced[0]]
        assert all(t.startswith(text) for t in forced) and len(forced) == (2 if TAG in text else 3)
    both = Plan("t", tuple(Rule(n, Trigger(start=True, gate=0.999), Action(force=t)) for n, t in
                           (("closes", NO_THINKING), ("speaks", "Okay.\n\n"))))  # fmt: skip
    out = SteeredModel(model, qwen3_like, both).generate(prompts_of(qwen3_like), max_new_tokens=40, temperature=0)
    assert [[e["rule"] for e in g.events if not e["suppressed"]] for g in out] == [["closes"], ["closes"], ["speaks"]]


@pytest.mark.parametrize("end", ["<|pad|>", "<|im_end|>"])
def test_every_end_of_the_models_list_ends_the_thinking(talker: Any, tokenizer: Any, prompts: Any, end: str) -> None:
    """A boundary rule and the thinking of the response: neither counts the end token, whichever it is."""
    model, listed = talker(eos=-30.0), tokenizer.convert_tokens_to_ids(["<|pad|>", "<|im_end|>"])
    with torch.no_grad():
        model.lm_head.bias[tokenizer.convert_tokens_to_ids(end)] = 5.0
    model.generation_config.eos_token_id = listed
    act = by_hand.rule({"add": True}, {"decode": True, "phase": "think"}, site=("residual:0",), strength=Strength(0.01))
    steered = SteeredModel(model, tokenizer, Plan("t", (act,)), directions={"d": DENSE})
    for watched in (steered, SteeredModel(model, tokenizer, Plan("none"))):
        for g in watched.generate(prompts, max_new_tokens=60, temperature=0):
            assert g.finished and g.response_ids[-1] == tokenizer.convert_tokens_to_ids(end)
            assert g.thinking_tokens == len(g.response_ids) - 1
            assert g.steps == segment(g.response_ids[:-1], tokenizer)[0]
    row = RowState(0, StepSegmenter(Separators.of(tokenizer), ends=listed))
    run = SteeringRun(steered.controller().steering, [row])
    run.prefill, said = False, []
    for token in (20, tokenizer.convert_tokens_to_ids(end), 20):
        run.read_ids(torch.tensor([[token]]))
        said += run._doses["r"].on.tolist()
    assert said == [True, False, False]


def test_think_or_not_asks_and_closes_behind_an_opened_thinking(
    monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., Any], qwen3_like: Any
) -> None:
    """Before the first token only, and only where the prompt opened none."""
    read: list[list[int]] = []
    letters = [qwen3_like.convert_tokens_to_ids(c) for c in "AB"]

    class Sure:
        def __init__(self, model: Any, cache: Any, mask: torch.Tensor, rows: list[int]):
            self.mask = mask[rows]

        def read(self, ids: list[list[int]]) -> torch.Tensor:
            read.extend(ids)
            logits = torch.full((len(ids), len(qwen3_like)), -30.0)
            logits[:, letters[0]] = 30.0
            return torch.log_softmax(logits, -1)

    monkeypatch.setattr(think_or_not, "Branch", Sure)
    model = baseline("think_or_not", make_model(), qwen3_like, options="AB")
    out = model.generate(prompts_of(qwen3_like), max_new_tokens=12, temperature=0)
    stub, opened = encode(qwen3_like, CLOSE + OPTION_STUB), encode(qwen3_like, "<think>\n" + CLOSE + OPTION_STUB)
    assert sorted(read) == sorted([stub, opened])
    assert [g.text.startswith(t) for g, t in zip(out, ["<think>\n" + CLOSE, CLOSE, ""], strict=True)] == [True] * 3
    assert [len(g.events) for g in out] == [1, 1, 0] and [g.probe_tokens for g in out] == [len(opened), len(stub), 0]
