"""`python -m peft_ref.cli`"""

import sys

from peft_ref.cli import main

sys.exit(main())
