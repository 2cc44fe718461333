"""What transformers makes of chat templates: templates.json, a list of {"template", "messages", "text"}.

    python tests/golden/make_templates.py        needs the `train` extra; writes templates.json next to this file

Templates and messages are written here; `text` is what `render_jinja_template` returns, or null where it raises. The special
tokens are those of tests/small_vocab.py, and no message contains one: there transformers and this project differ on purpose.
"""

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEADERS = "{{ '<|header_start|>' + role + '<|header_end|>\\n\\n' }}"
USER = {"role": "user", "content": "Why is 1 < 2 & <b>?"}
TALK = [
    {"role": "system", "content": "  Be brief.\n"},
    USER,
    {"role": "assistant", "content": "<think>\nlong thoughts\n</think>\n\nBecause."},
    {"role": "user", "content": "</think> 'quoted' \"twice\" é🦙 "},
]
CALLS = [
    USER,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.5, None, True], "c": "<é>"}}}
        ],
    },
    {"role": "ipython", "content": '{"sum": 3}'},
]
TEMPLATES = {
    "headers": "{{- bos_token }}{%- for m in messages %}\n    {{- '<|header_start|>' + m['role'] + '<|header_end|>\\n\\n' }}\n"
    "    {{- m.content | trim + '<|eot|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}\n{%- endif %}\n",
    "whitespace": "{{ bos_token }}\n  {% for m in messages %}\n  {{ m.role }}:\n    {% if loop.first %}\n  first\n    "
    "{% endif %}\n{{ m.content }}\n{# a comment #}\n  {% endfor %}\nend\n",
    "composed names": "{% for m in messages %}{{ '<|' ~ ('eot' if m.role == 'user' else 'eom') ~ '|>' }}{{ m.content }}"
    "{% endfor %}<|{{ 'step' }}|>{{ '<|%s|>' % 'eot' }}{{ '<|{}|>'.format('eom') }}",
    "thinking": "{% for m in messages %}{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% elif m.content.startswith('<') %}[{{ m.content[0] }}]"
    "{{ m.content | replace('<', '&lt;') }}{% else %}{{ m.content }}{% endif %}<|eot|>{% endfor %}",
    "last user by namespace": "{% set ns = namespace(last=-1, many=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% set ns.many = ns.many + 1 %}{% endif %}{% endfor %}"
    "{% for m in messages[::-1] %}{% if loop.revindex0 == ns.last %}>>{% endif %}{{ m.content }}|{% endfor %}{{ ns.many }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% set x = 1 %}<|eot|>{% endgeneration %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}",
    "macros": "{% macro turn(m, end='<|eot|>') %}<|header_start|>{{ m.role }}<|header_end|>"
    "{{ caller() if caller else m.content }}{{ end }}{% endmacro %}{% for m in messages %}"
    "{{ turn(m) }}{% call turn(m, end='<|eom|>') %}({{ m.content|length }})"
    "{% endcall %}{% endfor %}",
    "tools": "{% if tools is not none %}TOOLS{% endif %}{% if tools %}X{% endif %}{% if documents is defined and documents %}D"
    "{% endif %}{% if enable_thinking is defined and enable_thinking is false %}N{% endif %}{% for m in messages %}"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}{% set f = call.function %}<|python_start|>"
    '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}<|python_end|>{{ f.arguments | tojson(indent=2) }}'
    "{% for k, v in f.arguments.items() %}<parameter={{ k }}>{{ v | string if v is string else v | tojson }}</parameter>"
    "{% endfor %}{% endfor %}<|eom|>{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "unknown roles": "{% for m in messages %}{% if m.role not in ['user', 'assistant', 'system', 'ipython'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}{{ m.role | upper }}={{ m.content | capitalize }}{% endfor %}",
    "refused": "{{ messages[0].content }}{% if messages | length > 1 %}{{ raise_exception('only one turn') }}{% endif %}",
    "filters": "{{ messages | map(attribute='role') | join('<|eot|>') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ (messages | rejectattr('role', 'in', ['user']) | map(attribute='content') | list)[0:1] }}"
    "{{ messages | last | tojson }}{{ [3, 1, 2] | sort | reverse | list }}{{ {'b': 1, 'a': '<x>'} | dictsort }}"
    "{{ {'b': 1, 'a': '<x>'} | items | list }}{{ 'a b c'.split() | first }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ -3 | abs }}"
    "{{ 2.5 | round | int }}{{ none | default('d', true) }}{{ missing | default('d') }}{{ 'x' is string }}"
    "{{ 3 is divisibleby 3 }}{{ '%05.1f|%s' | format(3.14159, 'é') }}"
    "{{ 'ab' * 3 }}{{ 'abc' | batch(2) | list }}{{ 'line\\nline' | indent(2) }}"
    "{{ ['a', 'b'] | groupby(0) | length }}{{ 'é<' | tojson }}{{ messages[0].content.upper().title() }}{{ 'a' in 'abc' }}"
    "{{ range(3) | list }}{{ [1, 2] + [3] }}{{ (1, 2)[0] }}{{ 'x' if messages else 'y' }}{{ 1 ~ 'a' ~ none ~ [1] }}",
    "blocks": "{% set system %}{{ messages[0].content | trim }}!{% endset %}{% filter upper %}{{ system }}{% endfilter %}"
    "{% with a = system, b = 2 %}{{ a }}{{ b }}{% endwith %}{% raw %}{{ raw }}{% endraw %}{{ messages[-1].content }}",
    "recursive": "{% for x in [[1, [2, 3]], [4]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}"
    "{% if not loop.last %},{% endif %}{% endif %}{% endfor %}{{ messages[-1].content }}",
}


def main():
    from transformers.utils.chat_template_utils import render_jinja_template

    cases = []
    for name, template in TEMPLATES.items():
        for messages in ([USER], TALK, CALLS):
            try:
                tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>"}
                texts, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **tokens)
                text = texts[0]
            except Exception as error:
                print(name, repr(error)[:100])
                text = None
            cases.append({"name": name, "template": template, "messages": messages, "text": text})
    (HERE / "templates.json").write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
