"""An account's limits while jobs run: show them, or change them.

In:   base_url and key name the account, as in the jobs; limits that are left out stay as they are
Out:  on the console: limits 1200 requests a minute; in flight 14, cut to 20; workers 8
"""

from nli.api.chat import read_api_key
from nli.api.limiter import Limits
from nli.runtime.cluster import connected, finds_cluster
from nli.runtime.config import CountOrZero, NonNegative, config_class
from nli.runtime.errors import ClusterError
from nli.teacher.stage import describe_limits


@config_class
class AccountConfig:
    """Show an account's limits and how it is doing, or change the limits that are given; running jobs take them up within a second."""

    base_url: str = "https://api.mistral.ai"
    """the teacher's server, as the jobs name it"""
    api_key_file: str = ""
    """file that holds the API key; empty: MISTRAL_API_KEY from the environment or .env; none: the server asks for no key"""
    requests_per_minute: NonNegative | None = None
    """requests in any 60 seconds; 0: no limit; None: as it is"""
    tokens_per_minute: NonNegative | None = None
    """tokens of prompts and replies in any 60 seconds; 0: no limit; None: as it is"""
    calls_in_flight: CountOrZero | None = None
    """calls under way at once; 0: no limit; None: as it is"""


def run(config: AccountConfig) -> dict:
    """Change the limits that are given; returns and prints how the account is doing. Raises ClusterError without a cluster to join."""
    import ray

    from nli.api.services import start_limiter_service

    key = read_api_key(config.api_key_file)
    if not finds_cluster():
        raise ClusterError(
            "No Ray runs on this machine, and RAY_ADDRESS is not set: limits belong to a cluster. Run this where the jobs run."
        )
    with connected():
        limiter = start_limiter_service(config.base_url, key, Limits())
        now = ray.get(limiter.describe.remote())["limits"]
        wanted = now.changed(config.requests_per_minute, config.tokens_per_minute, config.calls_in_flight)
        if wanted != now:
            ray.get(limiter.set_limits.remote(wanted))
        found = ray.get(limiter.describe.remote())
    cut = f", cut to {found['ceiling']:.0f}" if found["ceiling"] else ""
    print(
        f"account: limits {describe_limits(found['limits'])}; in flight {found['in_flight']}{cut}; workers {found['workers']}",
        flush=True,
    )
    return found
