"""C++ files with their headers in them, as the compiler reads them from standard input, beside no folder."""

import re


def source_of(path):
    """The text of a C++ file, with the headers that lie beside it in the places where it includes them."""
    text = path.read_text(encoding="utf-8")

    def header(found):
        line = text.count("\n", 0, found.start()) + 2
        return f'{source_of(path.with_name(found[1]))}#line {line} "{path.name}"\n'

    return f'#line 1 "{path.name}"\n' + re.sub(r'^#include "(.+)"\n', header, text, flags=re.MULTILINE)
