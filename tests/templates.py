"""Chat templates as models publish them, and folders of a small vocabulary that has their special tokens."""

import json

from tiny import sentences

NAMES = ["<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
         "<|eot_id|>", "<|eom_id|>", "<|python_tag|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]",
         "[/INST]", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|user|>", "<|assistant|>",
         "<|end|>"]
# What models have as tokens, but don't call special: <think> in DeepSeek's, <tool_call> in Hermes'.
UNFLAGGED = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<｜User｜>", "<｜Assistant｜>"]

LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
            + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {%- if tool_call.name == 'brave_search' %}
            {{- "<|python_tag|>" + tool_call.name + ".call(" }}
            {%- for arg_name, arg_val in tool_call.arguments | items %}
                {{- arg_name + '="' + arg_val + '"' }}
            {%- endfor %}
            {{- ")<|eom_id|>" }}
        {%- else %}
            {{- '{"name": "' + tool_call.name + '", ' }}
            {{- '"parameters": ' }}
            {{- tool_call.arguments | tojson }}
            {{- "}<|eot_id|>" }}
        {%- endif %}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
SMOLLM2 = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
           "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM<|im_end|>\\n' }}{% endif %}"
           "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
           "{% endfor %}"
           "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
HERMES3 = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "system"
           or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {{- '\\n<tool_call>\\n' }}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments|tojson + '}' }}
            {{- '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.previtem and loop.previtem.role != "tool" %}
            {{- '<|im_start|>tool\\n' }}
        {%- endif %}
        {{- '<tool_response>\\n' + message.content }}
        {%- if not loop.last %}
            {{- '\\n</tool_response>\\n' }}
        {%- else %}
            {{- '\\n</tool_response>' }}
        {%- endif %}
        {%- if not loop.last and loop.nextitem.role != "tool" %}
            {{- '<|im_end|>' }}
        {%- elif loop.last %}
            {{- '<|im_end|>' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=false, is_tool=false, system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
    "{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}"
    "{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}")
GUARD = (
    "{% if messages|length % 2 == 0 %}{% set role = 'Agent' %}{% else %}{% set role = 'User' %}{% endif %}"
    "{{ '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\nTask: Check ' + role + ' messages."
    "\\n\\n<BEGIN CONVERSATION>\\n\\n' }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set role = 'User' %}{% elif message['role'] == 'assistant' %}{% set role = 'Agent' %}{% endif %}"
    "{{ role + ': ' + message['content'].strip() + '\\n\\n' }}{% endfor %}"
    "{{ '<END CONVERSATION><|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n' }}")
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}")
DATED = """{{ bos_token }}Today is {{ strftime_now('%d %B %Y') }}.
{% for message in messages %}
{% if message.role == 'system' %}
Note: {{ message.content }}
    {% continue %}
{% endif %}
<|start_header_id|>{{ message.role }}<|end_header_id|>
{{ message.content | upper if loop.first else message.content }}<|eot_id|>
{% endfor %}
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>
{% endif %}"""
QWEN3 = """{%- set ns = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user"
           and not(message.content.startswith('<tool_response>')
                   and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role != "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- else %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set reasoning_content = reasoning_content.lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
PHI = ("{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
       "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
PLAIN = ("{% macro line(message) %}{{ message.role | title }}: {{ message.content }}{% endmacro %}"
         "{% for message in messages %}{{ line(message) }}\n{% endfor %}"
         "{% if add_generation_prompt %}Assistant:{% endif %}")
# It looks into a text that it has put together itself.
MIXED = ("{% for message in messages %}"
         "{% set line = '<|im_start|>' ~ message.role ~ '\n' ~ message.content %}"
         "{% if '<tool_response>' in line %}{% set line = line.split('<tool_response>')[-1] %}{% endif %}"
         "{{ line }}<|im_end|>"
         "{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# Its macro and its block hold contents alone, which it then looks into.
MACRO = ("{% macro words(message) %}{{ message.content }}{% endmacro %}{% for message in messages %}"
         "{% set content = words(message) | trim %}{% set content %}{{ content }}{% endset %}"
         "{% if '</think>' in content %}"
         "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
         "<|im_start|>{{ message.role }}\n{{ content }}<|im_end|>{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
QUOTED = "{% for message in messages %}{{ message | tojson(indent=1) }}{{ eos_token }}{% endfor %}"

TEMPLATES = {  # name -> (template, BOS, EOS, the roles that it takes)
    "llama31": (LLAMA31, "<|begin_of_text|>", "<|eot_id|>", ["system", "user", "assistant"]),
    "smollm2": (SMOLLM2, "<|im_start|>", "<|im_end|>", ["system", "user", "assistant"]),
    "hermes3": (HERMES3, "<|begin_of_text|>", "<|im_end|>", ["system", "user", "assistant", "tool"]),
    "deepseek": (DEEPSEEK, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
                 ["system", "user", "assistant"]),
    "guard": (GUARD, "<|begin_of_text|>", "<|eot_id|>", ["user", "assistant"]),
    "mistral": (MISTRAL, "<s>", "</s>", ["user", "assistant"]),
    "dated": (DATED, "<|begin_of_text|>", "<|eot_id|>", ["system", "user", "assistant"]),
    "qwen3": (QWEN3, None, "<|im_end|>", ["system", "user", "assistant"]),
    "phi": (PHI, None, "<|end|>", ["user", "assistant"]),
    "plain": (PLAIN, None, "</s>", ["system", "user", "assistant"]),
    "mixed": (MIXED, None, "<|im_end|>", ["user", "assistant"]),
    "macro": (MACRO, None, "<|im_end|>", ["user", "assistant"]),
    "quoted": (QUOTED, None, "</s>", ["system", "user", "assistant"]),
}


def write_folder(folder, template=None, bos=None, eos=None, config=None):
    """Writes a small tokenizer.json with all NAMES, its config, and the template, and returns the folder."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as BPE

    from plumbing.tokenizer_json import word_splitter
    folder.mkdir(parents=True, exist_ok=True)
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = word_splitter()
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(sentences(300), trainers.BpeTrainer(
        vocab_size=500, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_special_tokens([AddedToken(name, normalized=False) for name in NAMES])
    bpe.add_tokens([AddedToken(name, normalized=False) for name in UNFLAGGED])
    bpe.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": bos, "eos_token": {"__type": "AddedToken", "content": eos} if eos else None}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, **(config or {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
