"""Conversations as documents: messages as in OpenAI's API, ShareGPT's or Alpaca's columns, and their text by a
tokenizer's chat template."""

from typing import TYPE_CHECKING, Any, Final

from jointq_cli.errors import TextError

if TYPE_CHECKING:  # transformers takes more than a second to import
    from transformers import PreTrainedTokenizerBase

Chat = list[dict[str, Any]]  # messages with the keys role and content
Document = str | Chat

SHAREGPT: Final = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}  # its roles


def messages(cell: Any) -> Chat | None:
    """The messages of a table's cell: {role, content}, or ShareGPT's {from, value}; None if it holds something else."""
    if not isinstance(cell, list) or not all(isinstance(message, dict) for message in cell):
        return None
    if all("role" in message for message in cell):
        return [{key: value for key, value in message.items() if value is not None} for message in cell]
    if all(isinstance(message.get("from"), str) and "value" in message for message in cell):
        return [
            {"role": SHAREGPT.get(message["from"], message["from"]), "content": message["value"]} for message in cell
        ]
    return None


def instruction(task: str, context: str, answer: str) -> Chat:
    """The two messages of a row of Alpaca's columns instruction, input and output; of an empty answer, none."""
    question = "\n\n".join(part for part in (task, context) if part.strip())
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] if answer.strip() else []


def template_of(tokenizer: "PreTrainedTokenizerBase", key: str) -> str:
    """key: of the recipe, for the message. Raises TextError for a tokenizer without a chat template."""
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise TextError(
            f"{key}: holds conversations, and the model's tokenizer has no chat template (chat_template.jinja); take "
            "the tokenizer of its instruction-tuned version, or a column of text"
        ) from error
    return template


def chat_text(chat: Chat, tokenizer: "PreTrainedTokenizerBase", key: str) -> str:
    """The conversation as text, special tokens included. Raises TextError where the tokenizer's template refuses it."""
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception as error:  # whatever a template raises
        reason = " ".join(str(error).split())[:200]
        roles = ", ".join(str(message["role"]) for message in chat[:8])
        raise TextError(f"{key}: the chat template refuses a conversation of {roles} ({reason})") from error
