"""Make a GGUF: from a Hugging Face folder or from another GGUF, streamed, in F32, F16, BF16, Q8_0 or Q4_0.

The one door is `quantize.convert.convert`. Imports only llamacli.{errors, ggml, gguf, kernels} of the engine.

    folder, safetensors -> names, hf_config, vocab -> recipe -> plan -> sources, encoders -> writer -> file.gguf
"""
