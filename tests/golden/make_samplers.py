"""Golden probabilities of llama.cpp's chains of samplers: `python tests/golden/make_samplers.py libllama.so COMMIT`.

In: any build of llama.cpp's library, and its commit. Stores in samplers.npz: `p`, float32 [n_cases, n_tokens], the
probabilities that are left after each chain of sampler_cases.py; `commit`.
"""

import ctypes
import sys
from ctypes import POINTER, Structure, c_bool, c_float, c_int32, c_int64, c_size_t, c_uint32, c_void_p

import numpy as np
from sampler_cases import STORED, N, cases

from llamacli.text.settings import SETTINGS


class Token(Structure):
    _fields_ = [("id", c_int32), ("logit", c_float), ("p", c_float)]


class Tokens(Structure):
    _fields_ = [("data", POINTER(Token)), ("size", c_size_t), ("selected", c_int64), ("sorted", c_bool)]


ARGUMENTS = {
    "penalties": (c_int32, c_int32, c_float, c_float, c_float),
    "dry": (c_void_p, c_float, c_float, c_int32, c_int32, c_void_p, c_size_t),
    "temp_ext": (c_float, c_float, c_float),
    "top_n_sigma": (c_float,),
    "top_k": (c_int32,),
    "typical": (c_float, c_size_t),
    "top_p": (c_float, c_size_t),
    "min_p": (c_float, c_size_t),
    "xtc": (c_float, c_float, c_size_t, c_uint32),
    "mirostat_v2": (c_uint32, c_float, c_float),
}


class Peer:
    def __init__(self, path):
        self.library = ctypes.CDLL(path)
        for name, kinds in ARGUMENTS.items():
            made = getattr(self.library, f"llama_sampler_init_{name}")
            made.restype, made.argtypes = c_void_p, kinds
        self.library.llama_sampler_apply.argtypes = (c_void_p, POINTER(Tokens))
        self.library.llama_sampler_accept.argtypes = (c_void_p, c_int32)
        self.library.llama_sampler_free.argtypes = (c_void_p,)

    def sampler(self, name, s):
        def made(name, *arguments):
            return getattr(self.library, f"llama_sampler_init_{name}")(*arguments)

        match name:
            case "penalties":
                amounts = s["repeat_penalty"], s["frequency_penalty"], s["presence_penalty"]
                return made(name, N, s["repeat_last_n"], *amounts)
            case "dry":
                rule = s["dry_multiplier"], s["dry_base"], s["dry_allowed_length"], s["dry_penalty_last_n"]
                return made(name, None, *rule, None, 0)
            case "temperature":
                return made("temp_ext", s["temp"], s["dynatemp_range"], s["dynatemp_exponent"])
            case "top_n_sigma" | "top_k":
                return made(name, s[name])
            case "typ_p":
                return made("typical", s["typical_p"], 1)
            case "top_p" | "min_p":
                return made(name, s[name], 1)
            case "xtc":
                return made(name, s["xtc_probability"], s["xtc_threshold"], 1, 1)

    def probabilities(self, case):
        logits = case.logits
        data = (Token * N)(*(Token(id, float(logits[id]), 0.0) for id in range(N)))
        tokens = Tokens(data, N, -1, False)
        settings = {name: rule[0] for name, rule in SETTINGS.items()} | case.settings
        chain = [self.sampler(name, settings) for name in case.order]
        if case.mirostat is not None:
            chain.append(self.library.llama_sampler_init_mirostat_v2(1, case.mirostat, 0.1))
        for sampler in chain:
            for id in case.history:
                self.library.llama_sampler_accept(sampler, id)
            self.library.llama_sampler_apply(sampler, ctypes.byref(tokens))
            self.library.llama_sampler_free(sampler)
        left = [tokens.data[i] for i in range(tokens.size)]
        found = np.full(N, -np.inf)
        found[[token.id for token in left]] = [token.logit for token in left]
        found = np.exp(found - found.max())
        return found / found.sum()


def main(path, commit):
    peer = Peer(path)
    np.savez_compressed(STORED, p=np.array([peer.probabilities(case) for case in cases()], np.float32), commit=commit)


if __name__ == "__main__":
    main(*sys.argv[1:])
