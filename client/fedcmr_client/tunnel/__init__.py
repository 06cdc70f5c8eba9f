"""The hospital's end of the way out: all that leaves the site for the coordinator passes here."""

from fedcmr_client.tunnel.credentials import Credentials
from fedcmr_client.tunnel.probe import probe
from fedcmr_client.tunnel.route import Proxy, Route
from fedcmr_client.tunnel.tunnel import Tunnel

__all__ = ["Credentials", "Proxy", "Route", "Tunnel", "probe"]
