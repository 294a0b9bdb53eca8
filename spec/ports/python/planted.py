"""The port beside this file with one mistake planted, to see what a diagnosis looks like:

peft-ref check -- python spec/ports/python/planted.py
"""

import port

port.INFO["name"] = "plain Python with a planted mistake"
port.scale_of = lambda config: config["lora_alpha"]  # the mistake: alpha instead of alpha / r
port.main()
