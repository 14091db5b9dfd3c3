"""What the fork server of the tests imports."""

from slurm.local import import_everything

import_everything()
