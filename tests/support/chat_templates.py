"""Small chat templates in the style of well-known models, with the texts that they must render.

Each template has an expected text for five conversations. `None` means that the template refuses the conversation.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Expected(NamedTuple):
    """The expected texts. BOS is `<s>` and EOS is `</s>`."""

    user: str
    """Text of the conversation USER."""
    system: str | None
    """Text of the conversation SYSTEM."""
    turns: str
    """Text of the conversation TURNS."""
    continued: str
    """Text of the conversation CONTINUED."""
    tools: str | None
    """Text of the conversation TOOLS."""


USER = [{"role": "user", "content": "What is 1+1?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *USER]
TURNS = [*USER, {"role": "assistant", "content": "2"}, {"role": "user", "content": "And 2+2?"}]
CONTINUED = [*USER, {"role": "assistant", "content": "The answer is"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "x"}}}
TOOLS: list[dict[str, Any]] = [
    *USER,
    {"role": "assistant", "content": None, "tool_calls": [{"id": "abcdefghi", **CALL}]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "add", "content": "2"},
]

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set turns = messages[1:] %}{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

_LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('Only one call at a time') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    '{{ \'{"name": "\' + f.name + \'", "parameters": \' }}{{ f.arguments | tojson }}{{ "}<|eot_id|>" }}'
    "{% elif m.role == 'tool' %}"
    "{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}{{ m.content | tojson }}{{ '<|eot_id|>' }}"
    "{% else %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

_GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    "{{ m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.tool_calls is defined and m.tool_calls is not none %}{{ '[TOOL_CALLS] [' }}"
    "{% for c in m.tool_calls %}{% set out = c.function | tojson %}{{ out[:-1] }}"
    "{% if c.id is undefined or c.id | length != 9 %}{{ raise_exception('IDs must have 9 characters') }}{% endif %}"
    "{{ ', \"id\": \"' + c.id + '\"}' }}{{ ', ' if not loop.last else ']' + eos_token }}{% endfor %}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% elif m.role == 'tool' %}"
    '{{ \'[TOOL_RESULTS] {"content": \' + m.content | string + \', "call_id": "\' + m.tool_call_id '
    "+ '\"}[/TOOL_RESULTS]' }}"
    "{% else %}{{ raise_exception('Only user, assistant and tool roles are supported') }}{% endif %}{% endfor %}"
)

_QWEN_2 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}"
    "{% elif m.role == 'assistant' and m.tool_calls %}{{ '<|im_start|>assistant' }}"
    "{% if m.content %}{{ '\\n' + m.content }}{% endif %}"
    "{% for c in m.tool_calls %}{% if c.function is defined %}{% set c = c.function %}{% endif %}"
    '{{ \'\\n<tool_call>\\n{"name": "\' + c.name + \'", "arguments": \' }}{{ c.arguments | tojson }}'
    "{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_QWEN_3 = (
    "{% for m in messages %}"
    "{% set content = m.content if m.content is string else '' %}"
    "{% if m.role == 'assistant' %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\\n' }}{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ content }}"
    "{% for c in m.tool_calls or [] %}{% if c.function %}{% set c = c.function %}{% endif %}"
    '{{ \'<tool_call>\\n{"name": "\' + c.name + \'", "arguments": \' }}'
    "{% if c.arguments is string %}{{ c.arguments }}{% else %}{{ c.arguments | tojson }}{% endif %}"
    "{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_PHI_3 = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)

_ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"
)

_DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages if m['role'] == 'system' %}{{ m['content'] }}{% endfor %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' and m['content'] is none %}{{ '<|Assistant|><|calls|>' }}"
    "{% for c in m['tool_calls'] %}"
    "{{ '<|call|>' + c['type'] + '<|sep|>' + c['function']['name'] + '\\n' + c['function']['arguments'] }}"
    "{% endfor %}{{ eos_token }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}"
    "{% elif m['role'] == 'tool' %}{{ '<|output|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)

_INTERN = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<|action|>' }}{{ c.function.name }}{{ ' ' }}{{ c.function.arguments }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_VISION = (
    "{% for m in messages %}{{ m.role | capitalize + ': ' }}"
    "{% for part in m.content %}{% if part.type == 'image' %}{{ '<image>' }}"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<end>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)

_VISION_OR_TEXT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text if 'text' in part else '<image>' }}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c | tojson + '</call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_IM_USER = "<|im_start|>user\nWhat is 1+1?<|im_end|>\n"
_IM_OPEN = "<|im_start|>assistant\n"
_IM_TURNS = f"{_IM_USER}{_IM_OPEN}2<|im_end|>\n<|im_start|>user\nAnd 2+2?<|im_end|>\n{_IM_OPEN}"
_IM_SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
_L3_USER = "<s><|start_header_id|>user<|end_header_id|>\n\nWhat is 1+1?<|eot_id|>"
_L3_OPEN = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_L3_SYSTEM = "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
_QWEN = "<|im_start|>system\nYou are Qwen.<|im_end|>\n"
_QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "x"}}\n</tool_call><|im_end|>\n'
_QWEN_ANSWER = f"<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n{_IM_OPEN}"
_GEMMA_USER = "<s><start_of_turn>user\nWhat is 1+1?<end_of_turn>\n"

TEMPLATES: dict[str, tuple[str, Expected]] = {
    "ChatML": (
        _CHATML,
        Expected(
            user=_IM_USER + _IM_OPEN,
            system=_IM_SYSTEM + _IM_USER + _IM_OPEN,
            turns=_IM_TURNS,
            continued=f"{_IM_USER}{_IM_OPEN}The answer is",
            tools=f"{_IM_USER}{_IM_OPEN}<|im_end|>\n<|im_start|>tool\n2<|im_end|>\n{_IM_OPEN}",  # no tool calls
        ),
    ),
    "Llama 2": (
        _LLAMA_2,
        Expected(
            user="<s>[INST] What is 1+1? [/INST]",
            system="<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is 1+1? [/INST]",
            turns="<s>[INST] What is 1+1? [/INST] 2 </s><s>[INST] And 2+2? [/INST]",
            continued="<s>[INST] What is 1+1? [/INST] The answer is",
            tools=None,
        ),
    ),
    "Llama 3": (
        _LLAMA_3,
        Expected(
            user=_L3_USER + _L3_OPEN,
            system=_L3_SYSTEM + _L3_USER.removeprefix("<s>") + _L3_OPEN,
            turns=f"{_L3_USER}{_L3_OPEN}2<|eot_id|>"
            f"<|start_header_id|>user<|end_header_id|>\n\nAnd 2+2?<|eot_id|>{_L3_OPEN}",
            continued=f"{_L3_USER}{_L3_OPEN}The answer is",
            tools=f'{_L3_USER}{_L3_OPEN}{{"name": "add", "parameters": {{"a": 1, "b": "x"}}}}<|eot_id|>'
            f'<|start_header_id|>ipython<|end_header_id|>\n\n"2"<|eot_id|>{_L3_OPEN}',
        ),
    ),
    "Gemma": (
        _GEMMA,
        Expected(
            user=f"{_GEMMA_USER}<start_of_turn>model\n",
            system=None,
            turns=f"{_GEMMA_USER}<start_of_turn>model\n2<end_of_turn>\n<start_of_turn>user\nAnd 2+2?<end_of_turn>\n"
            "<start_of_turn>model\n",
            continued=f"{_GEMMA_USER}<start_of_turn>model\nThe answer is",
            tools=None,
        ),
    ),
    "Mistral": (
        _MISTRAL,
        Expected(
            user="<s>[INST] What is 1+1?[/INST]",
            system=None,
            turns="<s>[INST] What is 1+1?[/INST] 2</s>[INST] And 2+2?[/INST]",
            continued="<s>[INST] What is 1+1?[/INST] The answer is",
            tools='<s>[INST] What is 1+1?[/INST][TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": "x"}, '
            '"id": "abcdefghi"}]</s>[TOOL_RESULTS] {"content": 2, "call_id": "abcdefghi"}[/TOOL_RESULTS]',
        ),
    ),
    "Qwen 2.5": (
        _QWEN_2,
        Expected(
            user=_QWEN + _IM_USER + _IM_OPEN,
            system=_IM_SYSTEM + _IM_USER + _IM_OPEN,
            turns=_QWEN + _IM_TURNS,
            continued=f"{_QWEN}{_IM_USER}{_IM_OPEN}The answer is",
            tools=f"{_QWEN}{_IM_USER}{_IM_OPEN}{_QWEN_CALL}{_QWEN_ANSWER}",
        ),
    ),
    "Qwen 3": (
        _QWEN_3,
        Expected(
            user=_IM_USER + _IM_OPEN,
            system=_IM_SYSTEM + _IM_USER + _IM_OPEN,
            turns=_IM_TURNS,
            continued=f"{_IM_USER}{_IM_OPEN}<think>\n\n</think>\n\nThe answer is",
            tools=f"{_IM_USER}{_IM_OPEN}{_QWEN_CALL}{_QWEN_ANSWER}",
        ),
    ),
    "Phi 3": (
        _PHI_3,
        Expected(
            user="<|user|>\nWhat is 1+1?<|end|>\n<|assistant|>\n",
            system="<|system|>\nBe brief.<|end|>\n<|user|>\nWhat is 1+1?<|end|>\n<|assistant|>\n",
            turns="<|user|>\nWhat is 1+1?<|end|>\n<|assistant|>\n2<|end|>\n<|user|>\nAnd 2+2?<|end|>\n<|assistant|>\n",
            continued="<|user|>\nWhat is 1+1?<|end|>\n<|assistant|>\nThe answer is",
            tools="<|user|>\nWhat is 1+1?<|end|>\n<|assistant|>\n<|end|>\n<|assistant|>\n",  # Phi 3 ignores tools
        ),
    ),
    "Zephyr": (
        _ZEPHYR,
        Expected(
            user="<|user|>\nWhat is 1+1?</s>\n<|assistant|>\n",
            system="<|system|>\nBe brief.</s>\n<|user|>\nWhat is 1+1?</s>\n<|assistant|>\n",
            turns="<|user|>\nWhat is 1+1?</s>\n<|assistant|>\n2</s>\n<|user|>\nAnd 2+2?</s>\n<|assistant|>\n",
            continued="<|user|>\nWhat is 1+1?</s>\n<|assistant|>\nThe answer is",
            tools="<|user|>\nWhat is 1+1?</s>\n<|assistant|>\n</s>\n<|tool|>\n2</s>\n<|assistant|>\n",
        ),
    ),
    "DeepSeek R1": (
        _DEEPSEEK_R1,
        Expected(
            user="<s><|User|>What is 1+1?<|Assistant|><think>\n",
            system="<s>Be brief.<|User|>What is 1+1?<|Assistant|><think>\n",
            turns="<s><|User|>What is 1+1?<|Assistant|>2</s><|User|>And 2+2?<|Assistant|><think>\n",
            continued="<s><|User|>What is 1+1?<|Assistant|>The answer is",
            tools='<s><|User|>What is 1+1?<|Assistant|><|calls|><|call|>function<|sep|>add\n{"a": 1, "b": "x"}</s>'
            "<|output|>2<|Assistant|><think>\n",
        ),
    ),
    "InternLM": (
        _INTERN,
        Expected(
            user=f"<s>{_IM_USER}{_IM_OPEN}",
            system=f"<s>{_IM_SYSTEM}{_IM_USER}{_IM_OPEN}",
            turns=f"<s>{_IM_TURNS}",
            continued=f"<s>{_IM_USER}{_IM_OPEN}The answer is",
            tools=f'<s>{_IM_USER}{_IM_OPEN}<|action|>add {{"a": 1, "b": "x"}}<|im_end|>\n'
            f"<|im_start|>tool\n2<|im_end|>\n{_IM_OPEN}",
        ),
    ),
    "a vision model's": (
        _VISION,
        Expected(
            user="User: What is 1+1?<end>\nAssistant: ",
            system="System: Be brief.<end>\nUser: What is 1+1?<end>\nAssistant: ",
            turns="User: What is 1+1?<end>\nAssistant: 2<end>\nUser: And 2+2?<end>\nAssistant: ",
            continued="User: What is 1+1?<end>\nAssistant: The answer is",
            tools="User: What is 1+1?<end>\nAssistant: <end>\nTool: 2<end>\nAssistant: ",
        ),
    ),
    "one that takes strings and parts": (
        _VISION_OR_TEXT,
        Expected(
            user=_IM_USER + _IM_OPEN,
            system=_IM_SYSTEM + _IM_USER + _IM_OPEN,
            turns=_IM_TURNS,
            continued=f"{_IM_USER}{_IM_OPEN}The answer is",
            tools=f'{_IM_USER}{_IM_OPEN}<call>{{"id": "abcdefghi", "type": "function", "function": {{"name": "add", '
            f'"arguments": {{"a": 1, "b": "x"}}}}}}</call><|im_end|>\n<|im_start|>tool\n2<|im_end|>\n{_IM_OPEN}',
        ),
    ),
}
