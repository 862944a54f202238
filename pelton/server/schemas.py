"""What clients send and get, as OpenAI defines it, with vLLM's additions.

https://platform.openai.com/docs/api-reference

Requests with a field that is not listed are refused by its name. Fields typed None are OpenAI's that are not supported:
clients may say null, which means the same as leaving them out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

Tokens = Annotated[int, Meta(ge=0)]
#: The largest number that fits the wire to the engines.
MAX_NUMBER = (1 << 63) - 1
#: A number whose own limits are checked with the other parameters.
Number = Annotated[int, Meta(ge=-MAX_NUMBER, le=MAX_NUMBER)]


class Strict(Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of a request: unknown fields are refused."""


class StreamOptions(Strict, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Strict, kw_only=True):
    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict, kw_only=True):
    """text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict, kw_only=True):
    """Exactly one of the fields; as :class:`pelton.StructuredOutputsParams`."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Sampling(Strict, kw_only=True):
    """What both kinds of completions have in common. Ranges are those of :class:`pelton.SamplingParams`."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None  # of no use here, as nothing is kept
    # What OpenAI does not have.
    best_of: int | None = None
    top_k: Number | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Number | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None
    priority: Number | None = None  # lower ones go first
    cache_salt: str | None = None  # prompts of different salts share nothing in the prefix cache
    timeout: Annotated[float, Meta(gt=0)] | None = None  # seconds
    return_token_ids: bool | None = None


class CompletionRequest(Sampling, kw_only=True):
    """``POST /v1/completions``. A prompt is a text or token ids; several prompts make a list."""

    prompt: str | list[str | int | list[int]]
    max_tokens: Number | None = 16
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None
    suffix: None = None


class ContentPart(Struct, kw_only=True):
    """A piece of a message. Only texts are read; what else there is says its type."""

    type: str
    text: str | UnsetType = UNSET


class FunctionCall(Strict, kw_only=True):
    name: str
    arguments: str


class ToolCall(Strict, kw_only=True):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Strict, kw_only=True):
    """A turn of a conversation. An assistant's may be what a completion gave, with all its fields."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class FunctionDefinition(Strict, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict, kw_only=True):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict, kw_only=True):
    name: str


class NamedToolChoice(Strict, kw_only=True):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampling, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Number | None = None
    max_completion_tokens: Number | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None  # given to the template, as enable_thinking=False for "none"
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None  # the last message is the beginning of the answer
    # OpenAI's that change nothing here.
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    modalities: list[Literal["text"]] | None = None
    # OpenAI's that are not supported.
    audio: None = None
    functions: None = None
    function_call: None = None
    prediction: None = None
    verbosity: None = None
    web_search_options: None = None


class PromptTokensDetails(Struct):
    cached_tokens: int = 0


class CompletionTokensDetails(Struct):
    reasoning_tokens: int = 0


class Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class CompletionLogprobs(Struct):
    """Per token of the text. The first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[str, Any] | None] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class CompletionResponse(Struct, kw_only=True):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | None = None


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[TokenLogprob] | None
    refusal: None = None


class FunctionDelta(Struct):
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallDelta(Struct):
    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta | UnsetType = UNSET


class Delta(Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChunkChoice(Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    system_fingerprint: str | None = None


class AnswerFunction(Struct):
    name: str
    arguments: str


class AnswerToolCall(Struct):
    id: str
    function: AnswerFunction
    type: Literal["function"] = "function"


class AnswerMessage(Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AnswerToolCall] | UnsetType = UNSET


class ChatChoice(Struct, kw_only=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatResponse(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    prompt_logprobs: list[dict[str, Any] | None] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ErrorBody(Struct):
    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class ErrorResponse(Struct):
    error: ErrorBody


class ModelCard(Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "pelton"
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None
    sampling_defaults: dict[str, float] = {}  # for what requests leave out, where they differ from OpenAI's


class ModelList(Struct):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class TokenizeRequest(Strict, kw_only=True):
    """``POST /tokenize``: a text, or a conversation with the model's chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeResponse(Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Strict, kw_only=True):
    model: str | None = None
    tokens: list[Tokens]


class DetokenizeResponse(Struct):
    prompt: str


class TokenizerInfo(Struct, kw_only=True):
    """What a client needs to make prompts of its own."""

    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
    chat_template: str | None = None
    vocab_size: int
    max_model_len: int


class EmbeddingRequest(Strict, kw_only=True):
    """``POST /v1/embeddings``. An input is a text or token ids; several make a list."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    user: str | None = None
    normalize: bool | None = None
    pooling: Literal["last", "mean"] | None = None
    priority: Number | None = None
    timeout: Annotated[float, Meta(gt=0)] | None = None  # seconds
    cache_salt: str | None = None


class Embedding(Struct):
    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class LoadAdapterRequest(Strict, kw_only=True):
    """``POST /v1/load_lora_adapter``, if the server allows it."""

    lora_name: str
    lora_path: str


class UnloadAdapterRequest(Strict, kw_only=True):
    lora_name: str


class Health(Struct):
    status: str


class VersionInfo(Struct):
    version: str


#: JSON of any of these.
encode = msgspec.json.Encoder().encode
