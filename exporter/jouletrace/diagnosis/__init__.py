"""Why a joule was used: drivers of power, verdicts on devices, causes of engines' joules per token."""
