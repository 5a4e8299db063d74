"""Preprocessing with what pip installs: antspyx, deepbet, scipy, in a nipype workflow. No distortion correction, no surfaces."""
