"""Conversations: replies are the model's own, and a turn runs only what it adds."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import byte_tokenizer, sentencepiece_tokenizer

from adapmoe_lab.engine.observing import observing
from adapmoe_lab.records import GatingTable
from adapmoe_lab.records.hook_points import HookPoint

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system speaks first') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = "{% for m in messages[-1:] %}<{{ m.role }}>{{ m.content }}{% endfor %}:"


def rendered(*messages):
    said = "".join(f"<{role}>{content}<|endoftext|>" for role, content in messages)
    return said + "<assistant>"


def plain_reply(model, ids, n_tokens):
    """Return what transformers' own generation adds to tokens, its keys and values begun anew."""
    output = model.hf.generate(torch.tensor([ids]), max_new_tokens=n_tokens, do_sample=False)
    return [token for token in output[0, len(ids) :].tolist() if token not in model.stop_ids]


def rendered_by(template, messages):
    return byte_tokenizer().apply_chat_template(
        list(messages), chat_template=template, tokenize=False
    )


@contextmanager
def replaced_tokens(model, tokens):
    """Let the model choose given tokens, one after the other, and read any."""
    wanted, embed, n_tokens = iter(tokens), model.hf.model.embed_tokens, model.hf.vocab_size

    def choose(module, arguments, logits):
        chosen = torch.nn.functional.one_hot(torch.tensor(next(wanted)), 2 * n_tokens)
        return chosen.expand(*logits.shape[:-1], -1)

    with (
        model.hf.lm_head.register_forward_hook(choose),
        embed.register_forward_pre_hook(lambda module, arguments: (arguments[0] % n_tokens,)),
    ):
        yield


class Written:
    """A conversation written out: its tokens, run anew by transformers for every reply."""

    def __init__(self, model, *messages):
        self.model, self.messages = model, list(messages)
        self.ids, self.text = [], ""

    def say(self, content, n_tokens):
        """Return the reply to a message, and how many tokens came before it and are in it."""
        self.messages.append(("user", content))
        whole = rendered(*self.messages)
        n_before = len(self.ids)
        self.ids = self.ids + self.model.tokenizer(whole[len(self.text) :])["input_ids"]
        tokens = plain_reply(self.model, self.ids, n_tokens)
        n_new, reply = len(self.ids) - n_before, self.model.tokenizer.decode(tokens)
        self.messages.append(("assistant", reply))
        self.ids, self.text = self.ids + tokens, whole + reply
        return reply, n_new, len(tokens)


@contextmanager
def counted(model):
    """Count the tokens that pass the first layer's experts."""
    counts = []

    def count(layer, hidden, *_):
        if layer == 0:
            counts.append(hidden.shape[0])

    with observing(model, {HookPoint.EXPERTS_INPUT: count}):
        yield counts


@pytest.fixture
def model(load_tiny):
    model = load_tiny()
    model.tokenizer.chat_template = TEMPLATE
    return model


def test_replies_are_the_models_own_and_a_turn_runs_what_it_adds(model):
    chat = model.conversation([{"role": "system", "content": "Be brief."}], max_new_tokens=6)
    expected = Written(model, ("system", "Be brief."))
    for number, said in enumerate(("Hello", "And then?", "Why?")):
        reply, n_prompt, n_reply = expected.say(said, 6)
        with counted(model) as counts:
            parts = list(chat.stream(said))
        assert "".join(parts) == reply
        # the last token of a reply is run in the next turn
        assert sum(counts) == n_prompt + n_reply - 1 + (number > 0)
    assert [(m["role"], m["content"]) for m in chat.messages] == expected.messages


def test_generate_replies_to_messages(model):
    messages = [{"role": "user", "content": "Hello"}]
    ids = model.tokenizer(rendered(("user", "Hello")))["input_ids"]
    reply = model.tokenizer.decode(plain_reply(model, ids, 5))
    assert model.generate(messages, 5) == reply
    assert "".join(model.stream(iter(messages), 5)) == reply
    assert model.conversation(max_new_tokens=5).say("Hello") == reply


def test_sampled_replies_repeat_and_differ_from_turn_to_turn(model):
    def replies(seed):
        chat = model.conversation(max_new_tokens=8, temperature=1.5, seed=seed, top_p=0.9)
        return [chat.say("Hello"), chat.say("Hello")]

    first = replies(1)
    assert first == replies(1)
    assert first != replies(2)
    assert first[0] != first[1]


def test_all_is_run_again_where_what_was_kept_is_of_no_use(model):
    chat, expected = model.conversation(max_new_tokens=4), Written(model)
    assert chat.say("Hello") == expected.say("Hello", 4)[0]
    model.apply(replace(model.config, gating=GatingTable.per_layer(np.zeros(3), 2)))
    reply = expected.say("Why?", 4)[0]
    with counted(model) as counts:
        assert chat.say("Why?") == reply
    assert sum(counts) == len(expected.ids) - 1


def test_an_interrupted_turn_is_taken_back(model):
    chat, other = (model.conversation(max_new_tokens=8) for _ in range(2))
    for each in (chat, other):
        each.say("Hello")
    before, n_passes = chat.messages, 0

    def interrupt(layer, _):
        nonlocal n_passes
        n_passes += layer == 0
        if (layer, n_passes) == (1, 3):
            raise KeyboardInterrupt

    with observing(model, {HookPoint.LAYER_OUTPUT: interrupt}), pytest.raises(KeyboardInterrupt):
        chat.say("More")
    assert chat.messages == before
    assert chat.say("More") == other.say("More")


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_reply_ends_where_its_stream_is_closed_or_the_next_turn_begins(model, is_closed):
    chat = model.conversation(max_new_tokens=30, temperature=1.5)
    stream = chat.stream("Hello")
    said = next(stream)
    if is_closed:
        stream.close()
        assert chat.messages[-1] == {"role": "assistant", "content": said}
    chat.say("More")
    assert [m["content"] for m in chat.messages[:3]] == ["Hello", said, "More"]


def test_a_stop_string_ends_a_reply(model):
    whole = model.conversation(max_new_tokens=20).say("Hello")
    assert len(whole) > 6
    stop = whole[4:6]
    chat = model.conversation(max_new_tokens=20, stop=[stop, "\N{SNOWMAN}"])
    assert chat.say("Hello") == whole[: whole.index(stop)]
    again = model.conversation(chat.messages, max_new_tokens=20, stop=stop)
    assert chat.say("More") == again.say("More")
    text = model.generate("Once", 20)
    assert model.generate("Once", 20, stop=text[8:10]) == text[: text.index(text[8:10], 4)]


def test_a_template_may_forget_what_was_said(model):
    chat = model.conversation(max_new_tokens=4, chat_template=FORGETFUL)
    chat.say("Hello")
    alone = model.conversation(max_new_tokens=4, chat_template=FORGETFUL)
    assert chat.say("More") == alone.say("More")


SPACED = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}\n{% endif %}{% endfor %}"
)


def test_kept_tokens_are_those_of_the_whole_text(load_tiny):
    """The template sets the space that a reply begins with; a text alone is given one."""
    model = load_tiny()
    model.tokenizer = tokenizer = sentencepiece_tokenizer()
    model.hf.generation_config.eos_token_id = tokenizer.eos_token_id
    reply = tokenizer(" Hello there")["input_ids"][1:]
    with replaced_tokens(model, [*reply, tokenizer.eos_token_id] * 3):
        chat = model.conversation(max_new_tokens=20, chat_template=SPACED)
        for said in ("One", "Two", "Three"):
            with counted(model) as counts:
                assert chat.say(said) == " Hello there"
            assert chat.messages[-1]["content"] == "Hello there"
            turn = ("\n" if said != "One" else " ") + f"[INST] {said} [/INST]"
            assert sum(counts) == len(turn) + len(reply)
    whole = rendered_by(SPACED, chat.messages)
    assert chat._said == (whole.rstrip("\n"), tokenizer(whole.rstrip("\n"))["input_ids"])


def test_a_stream_nobody_reads_was_not_said_and_a_bad_text_ends_no_reply(model):
    chat = model.conversation(max_new_tokens=30, temperature=1.5)
    chat.stream("Hello")
    stream = chat.stream("More")
    first = next(stream)
    with pytest.raises(ValueError, match="text must be one string, got 5"):
        chat.stream(5)
    reply = first + "".join(stream)
    assert [m["content"] for m in chat.messages] == ["More", reply]


def test_two_threads_cannot_take_one_turn(model):
    chat = model.conversation(max_new_tokens=4)
    stream, refused = chat.stream("Hello"), []

    def take_another(layer, _):
        if not refused:
            with pytest.raises(RuntimeError, match="Another thread is reading a reply") as error:
                chat.stream("More")
            refused.append(error)

    with observing(model, {HookPoint.LAYER_OUTPUT: take_another}):
        reply = "".join(stream)
    assert refused
    assert chat.messages[-1]["content"] == reply


def test_a_stream_that_is_not_read_begins_nothing(model, monkeypatch):
    """Where an executor decodes one sequence at a time, beginning one ends another."""
    begun = []
    monkeypatch.setattr(model.engine, "decoder", lambda hf: begun.append(hf))
    model.stream("Once upon a time")
    assert not begun


def test_what_no_template_takes_is_refused(load_tiny, model):
    chat = model.conversation(max_new_tokens=2)
    with pytest.raises(ValueError, match="does not take these messages: the system speaks first"):
        model.generate([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}])
    with pytest.raises(ValueError, match=r"text must be one string, got \['Hello'\]"):
        chat.stream(["Hello"])
    with pytest.raises(ValueError, match=r"messages\[0\] must be a message such as"):
        model.conversation(["Hello"])
    with pytest.raises(ValueError, match=r"messages must be messages such as .*, got 'Be brief'"):
        model.conversation("Be brief")
    with pytest.raises(ValueError, match="has no chat template"):
        load_tiny().conversation()
    assert chat.messages == ()
    model.close()
    with pytest.raises(RuntimeError, match="closed"):
        chat.say("Hello")
    assert chat.messages == ()
