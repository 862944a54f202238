"""Texts that break tokenizers: scripts, white space, digits, code, emoji, contractions, combining marks."""

TEXTS = (
    "",
    " ",
    "Hello world! It's 12345 o'clock, I'LL go\n\n\n  ok\t\tx  ",
    "Äpfel über ÉCOLE naïve 你好,世界。こんにちは 안녕하세요 ١٢٣٤",
    "def f(x):\n    return x**2 + 3.1415926 # ok\r\n\r\n",
    "🙂🚀👩\u200d👩\u200d👧 emoji e\u0301",
    "http://a.b/c?d=e&f=1000000 $%^&*()_+|~`<=>",
    " leading and trailing ",
    "हिन्दी भाषा ภาษาไทย العربية",
    "camelCaseHTTPServer XMLHttp iOS",
    "1 22 333 4444 55555 666666",
    "\u00a0x\u3000y\u2003z",
    "a\n b\n  c\n\n d",
    "「引用」！？…—“x”",
)
TRAINING = [text * 3 for text in TEXTS if text.strip()] + [
    "the quick brown fox jumps over the lazy dog and the dog sleeps in the sun",
    "it is what it is, and that is that; nothing more than this and these",
    "numbers 10 20 30 100 200 1000 2024 and words like tokenization, detokenization",
]
