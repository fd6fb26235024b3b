package hostile

import (
	"io"
	"net/netip"
	"testing"

	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// A Service whose endpoints somebody wrote by hand: kube-proxy's translation leads to the real endpoint (the API server lets
// fd00:ec2::254 pass), to the daemon's port, or to the port over the endpoint's own name, with and without masquerading. What
// comes out of the translation is routed like everything else, and refused. (S6)
func TestHostileService(t *testing.T) {
	t.Parallel()
	for name, masquerade := range map[string]bool{"plain": false, "masqueraded": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t)
			s := newStage(t, lab.NodeOptions{})
			translate := func(service, to netip.AddrPort) {
				t.Helper()
				command := "iptables"
				if to.Addr().Is6() {
					command = "ip6tables"
				}
				script := command + " -t nat -A PREROUTING -p tcp -d " + service.Addr().String() + " --dport 80 -j DNAT --to-destination " + to.String()
				if masquerade {
					script += "; " + command + " -t nat -A POSTROUTING -p tcp -d " + to.Addr().String() + " -j MASQUERADE"
				}
				s.on(t, script)
			}
			services := map[netip.AddrPort]netip.AddrPort{
				netip.MustParseAddrPort("10.96.0.10:80"):      netip.AddrPortFrom(imds.IPv4, 80),
				netip.MustParseAddrPort("10.96.0.11:80"):      netip.AddrPortFrom(s.IP, 8254),
				netip.MustParseAddrPort("[fd00:96::10]:80"):   netip.AddrPortFrom(imds.IPv6, 80),
				netip.MustParseAddrPort("[fd00:96::11]:80"):   netip.AddrPortFrom(s.IPv6, 8254),
				netip.MustParseAddrPort("169.254.169.253:80"): netip.AddrPortFrom(imds.IPv4, 80),
				netip.MustParseAddrPort("[fd00:ec2::253]:80"): netip.AddrPortFrom(imds.IPv6, 80),
				netip.MustParseAddrPort("169.254.169.252:80"): netip.AddrPortFrom(s.IP, 8254),
			}
			for service, to := range services {
				translate(service, to)
			}
			for service, to := range services {
				if c := tryDial(t, s.mallory, service.String()); c != nil {
					_, _ = io.WriteString(c, "GET /latest/user-data HTTP/1.0\r\n\r\n")
					answer, _ := io.ReadAll(c)
					t.Errorf("a Service that leads to %s is answered %.200s", to, answer)
				}
			}
			for _, p := range []*lab.Pod{s.mallory, s.victim} {
				if err := s.own(ctx, p); err != nil {
					t.Error(err)
				}
			}
			s.untouched(t)
		})
	}
}
