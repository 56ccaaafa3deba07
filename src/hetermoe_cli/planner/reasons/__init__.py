"""Why a plan is as it is: notes, what binds it, and why others lost or nothing fits."""
