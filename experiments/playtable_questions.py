"""Pictures of PlayTable with questions whose answers are right by construction, in LLaVA's format.

python -m experiments.playtable_questions                                             # the bundled set, anew
python -m experiments.playtable_questions --out runs/questions --pictures 2000 --random_tables 397
"""

from __future__ import annotations

import logging

from robovlms_jax import bars, cli
from robovlms_jax.playtable import questions
from robovlms_jax.runs import logs

if __name__ == "__main__":
    logs.to_stderr()
    settings = cli.read(questions.Settings, description=__doc__)
    with bars.waiting("drawing pictures"):
        counts = questions.write(settings)
    logging.info("%(pictures)d pictures with %(questions)d questions", counts)
    logging.info("they are in %s", settings.out)
