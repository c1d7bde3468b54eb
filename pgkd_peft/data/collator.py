"""Conversations → token batches in which position t of the student's completion is position t of the teacher's.

Shape legend: B rows, P longest student prompt, Q longest teacher prompt, C longest completion, all in tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, DataError, ModelError
from .answer import answer_text, closes_tag, continue_opening, thinking_fault
from .contexts import ContextBuilder, Contexts
from .shown import check_shown, holds, lost_thoughts, split_thoughts, unshown_fields

if TYPE_CHECKING:
    from ..config import PrivilegedGKDConfig


# Settings of a run that say what both contexts are.
CONTEXT_SETTINGS = (
    *("privileged_key", "max_privileged_length", "privileged_placement", "privileged_template"),
    *("allow_privileged_cut", "template_date"),
)


class RowTooLongError(DataError):
    """A conversation is longer than `max_length`. Nothing is ever cut from it."""


class PrivilegedTooLongError(DataError):
    """PI is longer than its budget, or than the model's context has room for. It is cut only where that is allowed."""


class DataCollatorForPrivilegedGKD:
    """Turns rows into left-padded student and teacher prompts and right-padded completions.

    Called with a list of B rows it returns long tensors:

    * ``prompts`` (B, P), ``prompt_attention_mask`` (B, P): the student's prompt, padded on the left;
    * ``teacher_prompts`` (B, Q), ``teacher_prompt_attention_mask`` (B, Q): the teacher's, PI included, likewise;
    * ``completions`` (B, C), ``completion_mask`` (B, C): the reference answer, padded on the right, mask 1 up to and
      including the end-of-turn token; all 0 for prompt-only rows (C is 0 when there is no answer in the batch);
    * ``has_privileged``, ``privileged_tokens``, ``privileged_tokens_cut`` (B,).

    Masks come from lengths, so a pad token that is also the EOS is trained where it ends an answer.

    Args:
        tokenizer: a Transformers tokenizer with a chat template.
        privileged_key: column with PI: a message list, or a string.
        max_length: tokens that the student's prompt and the reference answer may have together; None for no limit.
            The teacher's prompt may be longer by the PI. 1024 is GKDConfig's own default.
        max_privileged_length: budget in tokens for the PI text alone.
        privileged_placement: messages, user or system; see :class:`~pgkd_peft.data.contexts.ContextBuilder`.
        privileged_template: text template of the `user` and `system` placements.
        allow_privileged_cut: cut PI that is over its budget at its end; otherwise such a row is an error.
        context_length: positions that the model has, which prompt and answer must fit; None for no limit.
        max_new_tokens: length of an answer that is yet to be written, for `context_length`.
        template_date: the day (YYYY-MM-DD) that chat templates write as today's; None for the day of today.
        vocabulary: rows of the model's embedding, below which every token id must be; None where that is not known.

    Raises:
        ConfigError, ModelError: a setting or the tokenizer cannot work.
        DataError: (when called) a row cannot be used; its position in the batch is named.
    """

    def __init__(
        self,
        tokenizer: Any,
        privileged_key: str = "privileged_messages",
        max_length: int | None = 1024,
        max_privileged_length: int = 512,
        privileged_placement: str = "messages",
        privileged_template: str | None = None,
        allow_privileged_cut: bool = False,
        context_length: int | None = None,
        max_new_tokens: int = 0,
        template_date: str | None = None,
        vocabulary: int | None = None,
    ):
        if max_length is not None and max_length < 1:
            raise ConfigError(f"max_length is {max_length}; give a number of tokens, or None for no limit")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.allow_privileged_cut = allow_privileged_cut
        self.context_length, self.max_new_tokens = context_length, max_new_tokens
        self.vocabulary = vocabulary
        self.keep_sources = False  # a batch then holds the data rows too, as `sources`
        self.builder = ContextBuilder(
            tokenizer,
            privileged_key=privileged_key,
            max_privileged_length=max_privileged_length,
            privileged_placement=privileged_placement,
            privileged_template=privileged_template,
            template_date=template_date,
        )
        self.pad_token_id = pad_token_id(tokenizer)
        self.special_tokens = special_tokens(tokenizer)
        self.turn_end, self.end_of_turn = turn_end_texts(self.builder)

    @classmethod
    def from_config(
        cls,
        tokenizer: Any,
        config: PrivilegedGKDConfig,
        context_length: int | None = None,
        vocabulary: int | None = None,
    ) -> DataCollatorForPrivilegedGKD:
        """The collator with the settings of a :class:`~pgkd_peft.config.PrivilegedGKDConfig`.

        Raises:
            ConfigError, ModelError: a setting or the tokenizer cannot work.
        """
        made = cls.from_settings(
            tokenizer,
            vars(config),
            max_length=config.max_length,
            context_length=context_length,
            vocabulary=vocabulary,
            max_new_tokens=config.max_new_tokens if config.lmbda > 0 or config.seq_kd else 0,
        )
        made.keep_sources = config.feedback is not None
        return made

    @classmethod
    def from_settings(cls, tokenizer: Any, settings: Mapping[str, Any], **lengths: Any) -> DataCollatorForPrivilegedGKD:
        """The collator with what `settings` (of a config, or of a run's ``run.json``) say of the contexts."""
        return cls(tokenizer, **{name: settings[name] for name in CONTEXT_SETTINGS if name in settings}, **lengths)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        encoded = []
        for i, row in enumerate(rows):
            try:
                encoded.append(self.check_length(self.encode(row)))
            except DataError as error:
                raise DataError(f"row {i} of this batch (counted from 0): {error}", rows=(i,)) from error
        prompts, prompt_mask = self._pad([row["student_ids"] for row in encoded], left=True)
        teacher_prompts, teacher_mask = self._pad([row["teacher_ids"] for row in encoded], left=True)
        completions, completion_mask = self._pad([row["completion_ids"] for row in encoded], left=False)
        contexts: list[Contexts] = [row["contexts"] for row in encoded]
        sources = {"sources": [dict(row) for row in rows]} if self.keep_sources else {}
        return {
            **sources,
            "prompts": prompts,  # (B, P)
            "prompt_attention_mask": prompt_mask,  # (B, P)
            "teacher_prompts": teacher_prompts,  # (B, Q)
            "teacher_prompt_attention_mask": teacher_mask,  # (B, Q)
            "completions": completions,  # (B, C)
            "completion_mask": completion_mask,  # (B, C)
            "has_privileged": torch.tensor([c.has_privileged for c in contexts], dtype=torch.long),  # (B,)
            "privileged_tokens": torch.tensor([c.privileged_tokens for c in contexts], dtype=torch.long),  # (B,)
            "privileged_tokens_cut": torch.tensor([c.privileged_tokens_cut for c in contexts], dtype=torch.long),
        }

    def encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """One row as lists of ids, of any length: ``student_ids``, ``teacher_ids``, ``completion_ids`` ([] for a
        prompt-only row), the prompts as ``student_text`` and ``teacher_text``, the
        :class:`~pgkd_peft.data.contexts.Contexts` they come from, the index of each turn whose thoughts the template
        leaves out as ``lost_thoughts``, and names of turns' other fields that it leaves out as ``unshown_fields``.

        Raises:
            DataError: the row cannot be used.
        """
        contexts = self.builder.build(row)
        student_text = self.builder.render_student(contexts)
        teacher_text = self.builder.render_teacher(contexts)
        student_ids = self._tokenize(student_text)
        completion_text = self._completion_text(contexts, student_text) if contexts.answer else ""
        shown = student_text + completion_text
        turns = [*contexts.student, contexts.answer] if contexts.answer else contexts.student
        return {
            "student_ids": student_ids,
            "teacher_ids": student_ids if teacher_text == student_text else self._tokenize(teacher_text),
            "completion_ids": self._completion_ids(completion_text, student_text, student_ids),
            "student_text": student_text,
            "teacher_text": teacher_text,
            "contexts": contexts,
            "lost_thoughts": lost_thoughts(turns, shown),
            "unshown_fields": unshown_fields([*turns, *contexts.privileged], shown + teacher_text),
        }

    def check_length(self, encoded: dict[str, Any]) -> dict[str, Any]:
        """Return what :meth:`encode` made if nothing of the row would be lost: the conversation fits into `max_length`,
        the PI into its budget, and both prompts with an answer into the model's context and its vocabulary.

        Raises:
            DataError: a token has no row in the model's embedding.
            RowTooLongError: the conversation does not fit; nothing of it is ever cut.
            PrivilegedTooLongError: the PI does not.
        """
        prompt, answer = len(encoded["student_ids"]), len(encoded["completion_ids"])
        if self.max_length is not None and prompt > self.max_length:
            raise RowTooLongError(
                f"the prompt has {prompt} tokens, max_length is {self.max_length}; raise max_length or shorten it"
            )
        if self.max_length is not None and prompt + answer > self.max_length:
            raise RowTooLongError(
                f"prompt and answer have {prompt} + {answer} tokens, max_length is {self.max_length}; "
                "raise max_length or shorten them"
            )
        self._check_privileged(encoded["contexts"])
        self._check_context(encoded)
        self._check_vocabulary(encoded)
        return encoded

    def _check_vocabulary(self, encoded: dict[str, Any]) -> None:
        if self.vocabulary is None:
            return
        for name, what in (
            ("student_ids", "the prompt"),
            ("teacher_ids", "the teacher's prompt"),
            ("completion_ids", "the answer"),
        ):
            beyond = max(encoded[name], default=0)
            if beyond >= self.vocabulary:
                raise DataError(
                    f"{what} holds the token {self.tokenizer.convert_ids_to_tokens(beyond)!r} (id {beyond}), for which "
                    f"the model's embedding of {self.vocabulary} rows has none; take it out of the text, or use the "
                    "tokenizer that the model was trained with"
                )

    def _check_privileged(self, contexts: Contexts) -> None:
        if contexts.privileged_tokens_cut and not self.allow_privileged_cut:
            total = contexts.privileged_tokens + contexts.privileged_tokens_cut
            raise PrivilegedTooLongError(
                f"the PI has {total} tokens, max_privileged_length is {self.builder.max_privileged_length}; raise it "
                f"(--max_privileged_length {total}), shorten the PI, or let its end be cut (--allow_privileged_cut)"
            )

    def _check_context(self, encoded: dict[str, Any]) -> None:
        if self.context_length is None:
            return
        prompt, teacher = len(encoded["student_ids"]), len(encoded["teacher_ids"])
        answer = max(len(encoded["completion_ids"]), self.max_new_tokens)
        room = f"the model's context (max_position_embeddings) is {self.context_length}"
        if prompt + answer > self.context_length:
            raise RowTooLongError(f"prompt and answer have {prompt} + {answer} tokens, {room}; shorten them")
        if teacher + answer > self.context_length:
            tokens = encoded["contexts"].privileged_tokens
            fits = tokens - (teacher + answer - self.context_length)
            cut = f", or let its end be cut (--max_privileged_length {fits} --allow_privileged_cut)" if fits > 0 else ""
            raise PrivilegedTooLongError(
                f"the teacher's prompt ({tokens} tokens of it PI) and the answer have {teacher} + {answer} tokens, "
                f"{room}; shorten the PI or max_new_tokens{cut}"
            )

    def _completion_ids(self, text: str, prompt: str, prompt_ids: list[int]) -> list[int]:
        """The reference answer's ids as the model would have to write them after the generation prompt."""
        if not text:
            return []
        # Tokenize after the prompt where the prompt's own tokens stay as they are: some tokenizers would put a space
        # before the first word of a text that stands alone.
        joint = self._tokenize(prompt + text)
        if joint[: len(prompt_ids)] == prompt_ids:
            return joint[len(prompt_ids) :]
        return self._tokenize(text)

    def _completion_text(self, contexts: Contexts, prompt: str) -> str:
        """The answer as it goes on from the prompt: what the template writes, else the row's own text.

        Raises:
            DataError: neither gives one thinking block at most, opened and closed once, with the answer behind it.
        """
        answer = contexts.answer
        assert answer is not None
        template_text, opening = answer_text(self.builder, contexts, prompt)
        text = self._close_turn(template_text) if template_text else ""
        thoughts, words = split_thoughts(answer)
        fault = thinking_fault(opening, text, thoughts, words) if text else ""
        if answer.get("tool_calls"):
            if not text:
                raise DataError(
                    "the chat template writes the answer's tool call in another way than its generation prompt opens "
                    "it, so it cannot be learnt from; drop the answer (prompt-only row)"
                )
            if fault:
                raise DataError(fault)
            check_shown([{**answer, "content": words}], text, len(contexts.student))
            return text
        usable = bool(text) and not fault and holds(text, words)
        if usable and holds(text, thoughts):
            return text
        own = continue_opening(opening, answer)  # the template takes thoughts out of answers
        own_fault = thinking_fault(opening, own, thoughts, words)
        if usable and (own_fault or not holds(own, thoughts)):
            return text
        if own_fault:
            raise DataError(own_fault)
        return self._close_turn(own)

    def _close_turn(self, text: str) -> str:
        """End `text` with the end-of-turn token and nothing after it."""
        if self.turn_end and text.endswith(self.turn_end):
            closing, found, _ = self.turn_end.partition(self.end_of_turn)
            return text[: -len(self.turn_end)] + (closing if found else "") + self.end_of_turn
        stripped = text.rstrip()
        if any(stripped.endswith(token) for token in self.special_tokens):  # e.g. an end-of-call token
            return stripped
        return text + self.end_of_turn

    def _tokenize(self, text: str) -> list[int]:
        """Ids of a text that the chat template made (it holds the BOS); never truncated."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _pad(self, rows: list[list[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask (B, longest)."""
        longest = max(map(len, rows), default=0)
        ids = torch.full((len(rows), longest), self.pad_token_id, dtype=torch.long)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for i, row in enumerate(rows):
            span = slice(longest - len(row), None) if left else slice(0, len(row))
            ids[i, span] = torch.tensor(row, dtype=torch.long)
            mask[i, span] = 1
        return ids, mask


def pad_token_id(tokenizer: Any) -> int:
    """The pad token, else the EOS; the tokenizer is left as it is."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ConfigError("the tokenizer has neither a pad token nor an EOS token; set tokenizer.pad_token")


def turn_end_texts(builder: ContextBuilder) -> tuple[str, str]:
    """What the template writes after an assistant's last words, and the end-of-turn token in it.

    E.g. ``("<|im_end|>\\n", "<|im_end|>")``. The token is the first special token of that text (Phi-3 has
    ``<|end|>\\n<|endoftext|>``); a template that writes none leaves the tokenizer's EOS.
    """
    tokenizer = builder.tokenizer
    probe = [{"role": "user", "content": "Probeuser"}, {"role": "assistant", "content": "Probeanswer"}]
    _, found, turn_end = builder.render(probe, add_generation_prompt=False).rpartition("Probeanswer")
    if not found:
        turn_end = ""
    for tokens in (special_tokens(tokenizer), tokenizer.get_added_vocab()):  # some mark theirs as not special
        at = {turn_end.index(token): token for token in tokens if token in turn_end and not closes_tag(token)}
        if at:
            return turn_end, at[min(at)]
    return turn_end, tokenizer.eos_token or ""


def special_tokens(tokenizer: Any) -> list[str]:
    """Every special token's text: the named ones and the added ones (Gemma's end of turn is only among those)."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({token for token in [*tokenizer.all_special_tokens, *added] if token})


def stop_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """Every id that ends a rollout: the tokenizer's EOS, the generation config's, the template's end of turn.

    Args:
        generation_config: a model's GenerationConfig (its ``eos_token_id`` is an int, a list or None), or None.
    """
    ids = {tokenizer.eos_token_id}
    from_config = getattr(generation_config, "eos_token_id", None)
    ids.update(from_config if isinstance(from_config, (list, tuple)) else [from_config])
    if tokenizer.chat_template:
        _, end_of_turn = turn_end_texts(ContextBuilder(tokenizer))
        ids.update(tokenizer(end_of_turn, add_special_tokens=False)["input_ids"])
    odd = [token_id for token_id in ids if token_id is not None and not isinstance(token_id, int)]
    if odd:
        raise ModelError(f"eos_token_id of the model's generation_config.json is {odd[0]!r}; a token id is a number")
    return sorted(int(token_id) for token_id in ids if token_id is not None)
