package iptables

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

// kinds are the back ends.
var kinds = []string{"nft", "legacy"}

// targets is where the daemon listens; nextTargets where the next instance does.
var (
	targets     = []netip.AddrPort{gate4, gate6}
	nextTargets = []netip.AddrPort{next4, next6}
)

func newRules(t testing.TB, kind string, o Options) *Rules {
	t.Helper()
	o.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	r, err := New(o)
	must(t, err)
	r.kind = kind
	if kind == "legacy" {
		r.every = time.Second // no events tell of its changes
	}
	return r
}

// start runs r until the test ends, or until stop.
func start(t testing.TB, r *Rules) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Error("Run did not end with its context")
		}
	})
	t.Cleanup(stop)
	return stop
}

// protect makes both locks.
func protect(t testing.TB, r *Rules, to ...netip.AddrPort) {
	t.Helper()
	must(t, r.EnsureGuard(t.Context()))
	must(t, r.EnsureRedirect(t.Context(), to))
	must(t, r.Verified())
}

// canaries are rules of other agents, in every place where ours are.
func canaries(t testing.TB, kind string) {
	t.Helper()
	for f, addr := range map[family]string{ipv4: "169.254.169.254", ipv6: "fd00:ec2::254"} {
		x := commandOf(f, kind)
		for _, c := range []string{
			"-t nat -N CANARY", "-t nat -A PREROUTING -d " + addr + " -p tcp --dport 80 -m comment --comment canary -j CANARY", "-t nat -A CANARY -j RETURN",
			"-t filter -A INPUT -p tcp --dport 8254 -m comment --comment canary -j ACCEPT", "-t filter -A FORWARD -j ACCEPT", "-t mangle -A PREROUTING -j ACCEPT",
		} {
			run(t, x+" "+c)
		}
	}
}

// ruleCanaries are other agents' routing rules: beside the guard, like it, and with its tag.
func ruleCanaries(t testing.TB) {
	t.Helper()
	for six, addr := range map[string]string{"": "169.254.169.254", "-6 ": "fd00:ec2::254"} {
		beside := strings.Replace(addr, "254", "123", 2) // an address that is not ours
		for _, rule := range []string{
			"pref 0 to " + beside + " lookup main", "pref 1 nop protocol static", "pref 5000 to " + addr + " lookup main",
			"pref 5001 to " + addr + " iif eth7 unreachable protocol 169", "pref 5002 to " + addr + " unreachable protocol static",
		} {
			run(t, "ip "+six+"rule add "+rule)
		}
	}
}

func same(t testing.TB, when string, want, got map[string]string) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("%s (-before +after):\n%s", when, d)
	}
}

// The guard alone: at every step of its installation, repair and removal the node reaches the endpoint, and from unreachable
// on no pod does.
func TestKernelGuardSteps(t *testing.T) {
	kernelTest(t, func(t *testing.T) {
		l := newLab(t)
		l.unprotected("before")
		before := rules(t)
		if text := findings(newRules(t, "nft", Options{Guard: true}), Error); strings.Count(text, "the guard is not whole") != 2 {
			t.Errorf("Check of a virgin node: %s", text)
		}
		var steps []string
		r := newRules(t, "nft", Options{Guard: true})
		r.step = func(f family, op ruleOp) {
			steps = append(steps, op.String())
			when := fmt.Sprintf("%s, after %q", f.String(), op)
			l.nodeReaches(when, f)
			have, err := listRules(f)
			must(t, err)
			if slices.Contains(have, guardRules(f, 0)[2]) {
				l.refused(when, "", f)
			}
		}
		must(t, r.EnsureGuard(t.Context()))
		must(t, r.Verified())
		four := []string{"add 1: nop", "add 0: to 169.254.169.254/32 iif lo goto 1", "add 0: to 169.254.169.254/32 unreachable"}
		six := []string{"add 1: nop", "add 0: to fd00:ec2::254/128 iif lo goto 1", "add 0: to fd00:ec2::254/128 unreachable"}
		if d := cmp.Diff(append(four, six...), steps); d != "" {
			t.Errorf("installed in other steps (-want +got):\n%s", d)
		}
		for six, f := range map[string]family{"": ipv4, "-6 ": ipv6} {
			want := strings.NewReplacer("ENDPOINT", f.endpoint().String()).Replace("0:\tfrom all to ENDPOINT iif lo goto 1 proto 169\n" +
				"0:\tfrom all to ENDPOINT unreachable proto 169\n1:\tfrom all nop proto 169\n")
			if got := run(t, "ip "+six+"rule"); !strings.Contains(got, want) {
				t.Errorf("ip %srule:\n%swant in it:\n%s", six, got, want)
			}
		}

		// A repair of each rule. Without goto, or without its target, the node is cut off until then: closed, not open.
		for _, f := range families() {
			for _, missing := range guardRules(f, 0) {
				must(t, ruleOp{del: true, rule: missing}.apply(f))
				r.step = func(f family, op ruleOp) {
					when := fmt.Sprintf("repair of %s, after %q", missing, op)
					l.refused(when, "", f)
					if missing.action != nl.FR_ACT_GOTO {
						l.nodeReaches(when, f)
					}
				}
				must(t, r.EnsureGuard(t.Context()))
				l.nodeReaches("repaired "+missing.String(), f)
				have, err := listRules(f)
				must(t, err)
				must(t, guardDefect(f, 0, have))
			}
		}
		l.refused("repaired", "")

		steps = nil
		r.step = func(f family, op ruleOp) {
			steps = append(steps, op.String())
			l.nodeReaches(fmt.Sprintf("%s, after %q", f.String(), op), f)
		}
		must(t, r.Remove(t.Context()))
		undone := []string{
			"del 0: to 169.254.169.254/32 unreachable", "del 0: to 169.254.169.254/32 iif lo goto 1", "del 1: nop",
			"del 0: to fd00:ec2::254/128 unreachable", "del 0: to fd00:ec2::254/128 iif lo goto 1", "del 1: nop",
		}
		if d := cmp.Diff(undone, steps); d != "" {
			t.Errorf("removed in other steps (-want +got):\n%s", d)
		}
		l.unprotected("after removal")
		same(t, "Remove left something", before, rules(t))
	})
}

// What the package doc tells a unit to run at boot is the guard, and known as ours.
func TestKernelBootUnit(t *testing.T) {
	kernelTest(t, func(t *testing.T) {
		l := newLab(t)
		before := rules(t)
		doc, err := os.ReadFile("doc.go")
		must(t, err)
		commands := 0
		for line := range strings.SplitSeq(string(doc), "\n") {
			if command, ok := strings.CutPrefix(line, "//\tip rule add "); ok {
				commands++
				run(t, "ip rule add "+command)
				run(t, "ip -6 rule add "+strings.Replace(command, "169.254.169.254", "fd00:ec2::254", 1))
				l.nodeReaches("at boot, after " + command)
			}
		}
		if commands != 3 {
			t.Errorf("%d commands in doc.go", commands)
		}
		l.refused("at boot", "")
		r := newRules(t, "nft", Options{Guard: true})
		r.step = func(_ family, op ruleOp) { t.Errorf("EnsureGuard did %q", op) }
		must(t, r.EnsureGuard(t.Context()))
		r.step = nil
		must(t, r.Remove(t.Context()))
		same(t, "Remove left something", before, rules(t))
	})
}

// A refusal is told: at once, but for TCP over IPv6, where it comes back while connect(2) still holds the socket, so that Linux
// takes note of the one for the second SYN only, a second later.
func TestKernelRefusalIsTold(t *testing.T) {
	kernelTest(t, func(t *testing.T) {
		l := newLab(t)
		must(t, newRules(t, "nft", Options{Guard: true}).EnsureGuard(t.Context()))
		_ = l.bridge.udp(ipv6, long) // finds the neighbours
		for _, probe := range []struct {
			name  string
			limit time.Duration
			do    func() error
		}{
			{"TCP", 100 * time.Millisecond, func() error { _, err := l.ptp.dial(netip.AddrPortFrom(ipv4.endpoint(), 80)); return err }},
			{"UDP", 100 * time.Millisecond, func() error { return l.ptp.udp(ipv4, long) }},
			{"ICMP", 100 * time.Millisecond, func() error { return l.ptp.ping(ipv4, long) }},
			{"UDP over IPv6", 100 * time.Millisecond, func() error { return l.bridge.udp(ipv6, long) }},
			{"ICMP over IPv6", 100 * time.Millisecond, func() error { return l.bridge.ping(ipv6, long) }},
			{"TCP over IPv6", 1500 * time.Millisecond, func() error { _, err := l.bridge.dial(netip.AddrPortFrom(ipv6.endpoint(), 80)); return err }},
		} {
			// The machine may be somebody else's for a moment; Linux tells a source of five refusals at once, then of one a second.
			for attempt := 1; ; attempt++ {
				began := time.Now()
				err := probe.do()
				took := time.Since(began)
				if !errors.Is(err, unix.ENETUNREACH) {
					t.Errorf("%s: %v after %v", probe.name, err, took)
				} else if took > probe.limit && attempt < 3 {
					time.Sleep(time.Second)
					continue
				} else if took > probe.limit {
					t.Errorf("%s: after %v only", probe.name, took)
				}
				break
			}
		}
	})
}

// The guard without iptables, whatever other routing rules there are.
func TestKernelForeignRoutingRules(t *testing.T) {
	kernelTest(t, func(t *testing.T) {
		l := newLab(t)
		l.gates(8254)
		// As the Amazon VPC CNI makes them: what comes from a pod goes by a table with a route to the endpoint.
		eth0, err := netlink.LinkByName("eth0")
		must(t, err)
		for _, via := range []string{"10.0.0.2", "fd00:a::2"} {
			bits := 8 * len(netip.MustParseAddr(via).AsSlice())
			zero := &net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)}
			must(t, netlink.RouteAdd(&netlink.Route{Table: 101, Dst: zero, Gw: net.ParseIP(via), LinkIndex: eth0.Attrs().Index}))
		}
		rule := func(what, priority, rest string) {
			run(t, "ip rule "+what+" pref "+priority+" "+rest)
			run(t, "ip -6 rule "+what+" pref "+priority+" "+rest)
		}
		r := newRules(t, "nft", Options{Guard: true})
		for _, local := range []string{"0", "20"} {
			if local == "20" {
				rule("add", "20", "lookup local")
				rule("del", "0", "lookup local")
			}
			for _, priority := range []string{"1", "10", "99"} {
				when := "rules at " + priority + ", local at " + local
				rule("add", priority, "iif veth-ptp lookup 101")
				rule("add", priority, "iif cni0 lookup 101")
				l.unprotected(when + ", no guard")
				must(t, r.EnsureGuard(t.Context()))
				l.refused(when+", guard alone", "")
				l.nodeReaches(when + ", guard alone")
				must(t, r.EnsureRedirect(t.Context(), targets))
				if local == "20" && priority != "99" {
					// Strict security groups for pods: what is for the node leaves it too. Closed, and reported.
					text := fmt.Sprint(r.Check(t.Context()))
					if !strings.Contains(text, "strict mode") {
						t.Errorf("%s: Check does not tell of strict mode: %s", when, text)
					}
					for _, f := range families() {
						for _, pod := range l.pods {
							if got, err := pod.dialFor(netip.AddrPortFrom(f.endpoint(), 80), short); err == nil {
								t.Errorf("%s: %s got %q", when, pod.name, got)
							}
						}
					}
					if n := l.arrived(); n > 0 {
						t.Errorf("%s: %d packets arrived at the real endpoint", when, n)
					}
				} else {
					l.refused(when+", both locks", "gate:8254")
				}
				l.nodeReaches(when + ", both locks")
				must(t, r.Remove(t.Context()))
				rule("del", priority, "iif veth-ptp lookup 101")
				rule("del", priority, "iif cni0 lookup 101")
			}
		}
		// One that beats the guard is told of.
		must(t, r.EnsureGuard(t.Context()))
		rule("add", "0", "iif cni0 lookup 101") // behind the guard
		if text := findings(r, Error); strings.Contains(text, "beats the guard") {
			t.Errorf("Check: false alarm: %s", text)
		}
		r.priority = 200
		if text := findings(r, Error); strings.Count(text, "beats the guard") != 2 {
			t.Errorf("Check must tell of two rules that beat a guard at 200: %s", text)
		}
	})
}

// findings returns Check's findings of a severity.
func findings(r *Rules, s Severity) string {
	var b strings.Builder
	for _, f := range r.Check(context.Background()) {
		if f.Severity == s {
			fmt.Fprintln(&b, f.Family, f.Subject, f.Text)
		}
	}
	return b.String()
}

// The redirect, its own port's lock, connections from before, and removal, with both back ends; with the guard, and without.
func TestKernelRedirect(t *testing.T) {
	kernelTest(t, func(t *testing.T) {
		l := newLab(t)
		l.gates(8254)
		ruleCanaries(t)
		for _, kind := range kinds {
			canaries(t, kind)
		}
		for _, kind := range kinds {
			before := rules(t)
			r := newRules(t, kind, Options{Guard: true, StateDir: t.TempDir()})
			var podConns, nodeConns []net.Conn
			for _, f := range families() {
				for _, pod := range l.pods {
					c, got, err := pod.open(netip.AddrPortFrom(f.endpoint(), 80))
					if err != nil || got != "real" {
						t.Fatalf("before: %q, %v", got, err)
					}
					podConns = append(podConns, c)
				}
				c, _, err := l.node.open(netip.AddrPortFrom(f.endpoint(), 80))
				must(t, err)
				nodeConns = append(nodeConns, c)
			}
			protect(t, r, targets...)
			l.arrived()
			for _, c := range podConns {
				if got, err := again(c); !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("%s: a connection from before the rules: got %q, %v, want a reset", kind, got, err)
				}
			}
			if n := l.arrived(); n > 0 {
				t.Errorf("%s: %d packets of connections from before arrived at the real endpoint", kind, n)
			}
			for _, c := range nodeConns {
				if got, err := again(c); got != "real" {
					t.Errorf("%s: the node's own connection: got %q, %v", kind, got, err)
				}
			}
			l.refused(kind, "gate:8254")
			l.nodeReaches(kind)
			for _, from := range []*host{l.ptp, l.bridge, l.fabric, l.node} {
				for _, to := range targets {
					if got, err := from.dial(to); !errors.Is(err, unix.ECONNREFUSED) {
						t.Errorf("%s: %s directly to %s: got %q, %v, want a refusal", kind, from.name, to, got, err)
					}
				}
			}
			// Once more: nothing to do, and a held connection stays.
			c, got, err := l.ptp.open(netip.AddrPortFrom(ipv4.endpoint(), 80))
			if err != nil || got != "gate:8254" {
				t.Fatalf("%s: got %q, %v", kind, got, err)
			}
			for _, f := range families() {
				changed, err := applyRedirect(t.Context(), r.backends[f], r.want[f])
				if changed || err != nil {
					t.Errorf("%s: a second time: changed %v, %v", kind, changed, err)
				}
			}
			protect(t, newRules(t, kind, Options{Guard: true}), targets...)
			if got, err := again(c); got != "gate:8254" {
				t.Errorf("%s: a connection held over a restart: got %q, %v", kind, got, err)
			}
			golden(t, "installed.txt", installed(t, kind))
			if text := findings(r, Error) + findings(r, Warning); text != "" {
				t.Errorf("%s: Check finds fault: %s", kind, text)
			}

			// The redirect without the guard, then what a crashed run left at another priority.
			for _, f := range families() {
				have, err := listRules(f)
				must(t, err)
				must(t, r.applyGuard(t.Context(), f, planRemoval(f, have)))
				for _, pod := range l.pods {
					if got, err := pod.dial(netip.AddrPortFrom(f.endpoint(), 80)); got != "gate:8254" {
						t.Errorf("%s: the redirect alone: %q, %v", kind, got, err)
					}
				}
			}
			must(t, newRules(t, kind, Options{Guard: true, GuardPriority: 300}).EnsureGuard(t.Context()))
			l.refused(kind+", guard at 300", "gate:8254")

			must(t, r.Remove(t.Context()))
			must(t, r.Remove(t.Context())) // once more does nothing
			same(t, kind+": after Remove", before, rules(t))
			l.unprotected(kind + ", after Remove")
		}
	})
}

// installed returns what iptables-save shows of ours.
func installed(t testing.TB, kind string) string {
	t.Helper()
	var b strings.Builder
	for _, f := range families() {
		for _, w := range ourTables() {
			for line := range strings.SplitSeq(run(t, commandOf(f, kind)+"-save -t "+w.name), "\n") {
				if strings.Contains(line, chainName) {
					fmt.Fprintln(&b, volatile.ReplaceAllString(line, ""))
				}
			}
		}
	}
	return b.String()
}

var update = flag.Bool("update", false, "write testdata")

func golden(t testing.TB, name, got string) {
	t.Helper()
	if *update {
		must(t, os.WriteFile(filepath.Join("testdata", name), []byte(got), 0o644))
	}
	want, err := os.ReadFile(filepath.Join("testdata", name))
	must(t, err)
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("testdata/%s (-want +got):\n%s", name, d)
	}
}

// The guard off: what was open before is cut by conntrack alone. An interface that the redirect does not serve is refused by the
// guard; a family without a target has the guard alone, and a redirect that it had goes.
func TestKernelOptions(t *testing.T) {
	kernelTest(t, func(t *testing.T) {
		l := newLab(t)
		l.gates(8254)
		for _, kind := range kinds {
			for _, f := range families() {
				c, _, err := l.ptp.open(netip.AddrPortFrom(f.endpoint(), 80))
				must(t, err)
				r := newRules(t, kind, Options{})
				protect(t, r, targets...)
				l.arrived()
				if got, err := again(c); !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("%s, %s: a connection from before: got %q, %v, want a reset", kind, f.String(), got, err)
				}
				if n := l.arrived(); n > 0 {
					t.Errorf("%s, %s: %d packets arrived at the real endpoint", kind, f.String(), n)
				}
				must(t, r.Remove(t.Context()))
			}
			for pattern, served := range map[string]*host{"cni+": l.bridge, "!cni0": l.ptp} {
				r := newRules(t, kind, Options{Guard: true, Interface: pattern})
				protect(t, r, targets...)
				for _, f := range families() {
					for _, pod := range l.pods {
						limit, want := short, ""
						if pod == served {
							limit, want = long, "gate:8254"
						}
						if got, err := pod.dialFor(netip.AddrPortFrom(f.endpoint(), 80), limit); got != want {
							t.Errorf("%s, -interface %s: %s got %q, %v, want %q", kind, pattern, pod.name, got, err, want)
						}
					}
				}
				if n := l.arrived(); n > 0 {
					t.Errorf("%s, -interface %s: %d packets arrived at the real endpoint", kind, pattern, n)
				}
			}
			r := newRules(t, kind, Options{Guard: true, GuardPriority: 50}) // another priority than before
			protect(t, r, gate4)
			l.refused(kind+", IPv4 alone", "gate:8254", ipv4)
			l.refused(kind+", IPv4 alone", "", ipv6)
			for c, text := range rules(t) {
				if strings.HasPrefix(c, "ip6tables") && strings.Contains(text, chainName) || strings.Count(text, "proto 169") > 3 {
					t.Errorf("%s: the earlier rules stay: %s:\n%s", kind, c, text)
				}
			}
			must(t, r.Remove(t.Context()))
		}
	})
}

// Everything that is removed behind our back comes back, and until then the other lock holds.
func TestKernelRepairNFT(t *testing.T) { kernelTest(t, func(t *testing.T) { testRepair(t, "nft") }) }
func TestKernelRepairLegacy(t *testing.T) {
	kernelTest(t, func(t *testing.T) { testRepair(t, "legacy") })
}

func testRepair(t *testing.T, kind string) {
	l := newLab(t)
	l.gates(8254)
	metrics := prometheus.NewRegistry()
	r := newRules(t, kind, Options{Guard: true, GuardPriority: 100, StateDir: t.TempDir(), Metrics: metrics})
	protect(t, r, targets...)
	start(t, r)
	x4, x6 := commandOf(ipv4, kind), commandOf(ipv6, kind)
	flush := []string{x4 + " -t nat -F", x4 + " -t nat -X", x6 + " -t nat -F", x6 + " -t nat -X"}
	if kind == "nft" {
		flush = []string{"nft flush ruleset"}
	}
	served := func() bool {
		for _, f := range families() {
			for _, pod := range l.pods {
				switch got, err := pod.dialFor(netip.AddrPortFrom(f.endpoint(), 80), short); {
				case got == "real":
					t.Fatalf("%s: a pod reached the real endpoint", kind)
				case err != nil:
					return false
				}
			}
		}
		return r.Verified() == nil
	}
	for _, damage := range []struct {
		name     string
		commands []string
	}{
		{"flush", flush},
		{"jump deleted", []string{x4 + " -t nat -D PREROUTING 1", x6 + " -t nat -D PREROUTING 1"}},
		{"rule deleted", []string{x4 + " -t nat -F IMDSGATE"}},
		{"rule added", []string{x6 + " -t nat -I IMDSGATE -j RETURN"}},
	} {
		for attempt := 1; ; attempt++ {
			for _, c := range damage.commands {
				run(t, c)
			}
			if damage.name == "flush" && kind == "nft" {
				l.refused(damage.name, either)
			}
			took := eventually(t, 10*time.Second, damage.name+": the redirect is whole again", served) // by an event: the interval is 30 s
			t.Logf("%s: whole again after %v", damage.name, took)
			if took <= 2*time.Second || damage.name != "flush" {
				break
			}
			if attempt == 3 { // the machine may have been somebody else's for a moment
				t.Errorf("%s: the redirect was whole again after %v only", damage.name, took)
				break
			}
		}
	}
	// The lock of our port.
	run(t, x4+" -t filter -F INPUT")
	eventually(t, 10*time.Second, "the port is locked again", func() bool {
		_, err := l.ptp.dial(gate4)
		return errors.Is(err, unix.ECONNREFUSED)
	})

	// ip rule flush takes everything but priority 0 along.
	for six, f := range map[string]family{"": ipv4, "-6 ": ipv6} {
		run(t, "ip "+six+"rule flush")
		run(t, "ip "+six+"rule add pref 32766 lookup main")
		eventually(t, 5*time.Second, f.String()+": the guard is whole again", func() bool {
			have, err := listRules(f)
			must(t, err)
			return guardDefect(f, 100, have) == nil
		})
	}
	l.refused("after ip rule flush", "gate:8254")
	l.nodeReaches("after ip rule flush")
	must(t, r.Verified())
	for what, least := range map[string]float64{"redirect": 4, "guard": 2} {
		if n := testutil.ToFloat64(r.repairs.WithLabelValues(what)); n < least {
			t.Errorf("imdsgate_repairs_total{what=%q} is %v", what, n)
		}
	}
	if problems, err := testutil.GatherAndLint(metrics); err != nil || len(problems) > 0 {
		t.Errorf("metrics: %v %v", problems, err)
	}

	// Another agent that insists on the first place gets it, is reported, and put behind once in a while.
	r.turn <- struct{}{}
	r.putFirst[ipv4] = rate.NewLimiter(rate.Every(time.Hour), 2)
	<-r.turn
	first := func() bool {
		return strings.HasPrefix(strings.SplitN(run(t, x4+" -t nat -S PREROUTING"), "\n", 3)[1], "-A PREROUTING -m comment --comment imdsgate -j IMDSGATE")
	}
	for range 2 {
		run(t, x4+" -t nat -I PREROUTING -p udp -m comment --comment insists -j RETURN")
		r.wake.raise()
		eventually(t, 10*time.Second, "our jump is first again", first)
	}
	run(t, x4+" -t nat -I PREROUTING -p udp -m comment --comment insists2 -j RETURN")
	r.verifyRedirect(t.Context())
	if first() {
		t.Error("the first place is fought for")
	}
	if err := r.Verified(); err != nil {
		t.Errorf("a harmless rule before ours counts as a defect: %v", err)
	}
	run(t, x4+" -t nat -I PREROUTING -d 169.254.169.254 -p tcp --dport 80 -j DNAT --to-destination 10.0.0.1:8181")
	r.verifyRedirect(t.Context())
	if err := r.Verified(); !errors.Is(err, errTaken) {
		t.Errorf("a foreign DNAT before ours: Verified: %v", err)
	}
	if text := findings(r, Error); !strings.Contains(text, "10.0.0.1:8181") {
		t.Errorf("Check does not tell of the foreign DNAT: %s", text)
	}

	// The target's address is lost.
	node, err := netlink.LinkByName("eth0")
	must(t, err)
	a, err := netlink.ParseAddr(node4.String() + "/24")
	must(t, err)
	must(t, netlink.AddrDel(node, a))
	eventually(t, 10*time.Second, "Verified tells of the lost address", func() bool {
		err := r.Verified()
		return err != nil && strings.Contains(err.Error(), "no interface of the node has the address 10.0.0.1")
	})
}

// Two instances: the change of target loses no connection, and the older one leaves the rules alone from then on.
func TestKernelHandover(t *testing.T) {
	kernelTest(t, func(t *testing.T) {
		l := newLab(t)
		l.gates(8254)
		l.gates(8255)
		dir := t.TempDir()
		for i, kind := range kinds {
			old := newRules(t, kind, Options{Guard: true, StateDir: dir})
			protect(t, old, targets...)
			old.every = time.Hour // it must notice by an event
			start(t, old)
			held, _, err := l.ptp.open(netip.AddrPortFrom(ipv4.endpoint(), 80))
			must(t, err)

			ctx, cancel := context.WithCancel(t.Context())
			var workers sync.WaitGroup
			var count [2]atomic.Int64
			var moved atomic.Bool
			for _, f := range families() {
				for _, pod := range l.pods {
					workers.Go(func() {
						for ctx.Err() == nil {
							after := moved.Load()
							got, err := pod.dial(netip.AddrPortFrom(f.endpoint(), 80))
							switch {
							case got == "gate:8254" && !after:
								count[0].Add(1)
							case got == "gate:8255":
								count[1].Add(1)
							default:
								t.Errorf("%s, %s: got %q, %v (after the change: %v)", kind, f.String(), got, err, after)
								return
							}
						}
					})
				}
			}
			eventually(t, 5*time.Second, "connections to the old instance", func() bool { return count[0].Load() > 50 })
			fresh := newRules(t, kind, Options{Guard: true, StateDir: dir})
			protect(t, fresh, nextTargets...)
			moved.Store(true)
			eventually(t, 5*time.Second, "connections to the new instance", func() bool { return count[1].Load() > 50 })
			cancel()
			workers.Wait()
			t.Logf("%s: %d connections to the old instance, %d to the new one", kind, count[0].Load(), count[1].Load())
			if got, err := again(held); got != "gate:8254" {
				t.Errorf("%s: a connection held over the change: got %q, %v", kind, got, err)
			}
			select {
			case <-old.Superseded():
			case <-time.After(5 * time.Second):
				t.Errorf("%s: the old instance does not notice", kind)
			}
			if err := old.Verified(); !errors.Is(err, errSuperseded) {
				t.Errorf("%s: the old instance's Verified: %v", kind, err)
			}
			for _, to := range slices.Concat(targets, nextTargets) { // the old one's port while it drains, too
				if _, err := l.ptp.dial(to); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("%s: directly to %s: %v", kind, to, err)
				}
			}
			// The old one repairs nothing, the new one does.
			run(t, commandOf(ipv4, kind)+" -t nat -F IMDSGATE")
			old.verifyRedirect(t.Context())
			if n := testutil.ToFloat64(old.repairs.WithLabelValues("redirect")); n != 0 {
				t.Errorf("%s: the old instance repaired %v times", kind, n)
			}
			if text := run(t, commandOf(ipv4, kind)+" -t nat -S IMDSGATE"); strings.Contains(text, "DNAT") {
				t.Errorf("%s: the old instance repaired: %s", kind, text)
			}
			fresh.verifyRedirect(t.Context())
			if got, err := l.ptp.dial(netip.AddrPortFrom(ipv4.endpoint(), 80)); got != "gate:8255" {
				t.Errorf("%s: repaired by the new instance: %q, %v", kind, got, err)
			}
			if i == 0 {
				must(t, fresh.Remove(t.Context()))
			}
		}
		// A removal beside a running instance holds.
		r := newRules(t, "nft", Options{Guard: true, StateDir: dir})
		protect(t, r, targets...)
		start(t, r)
		must(t, newRules(t, "", Options{StateDir: dir}).Remove(t.Context()))
		<-r.Superseded()
		r.verifyGuard(t.Context())
		r.verifyRedirect(t.Context())
		for c, text := range rules(t) {
			if strings.Contains(text, chainName) || strings.Contains(text, "proto 169") {
				t.Errorf("%s after Remove:\n%s", c, text)
			}
		}
	})
}

// An IP's connections to the instance before this one are spared while that has sockets, and forgotten when it has ended. Then whoever
// comes from the same port, as the next holder of the IP may, reaches this one; conntrack alone would refuse it.
func TestKernelHandoverEnds(t *testing.T) {
	kernelTest(t, func(t *testing.T) {
		l := newLab(t)
		l.gates(8255)
		dir := t.TempDir()
		old, fresh := newRules(t, "nft", Options{Guard: true, StateDir: dir}), newRules(t, "nft", Options{Guard: true, StateDir: dir})
		protect(t, old, targets...)
		connect := func(f family) (c net.Conn, err error) {
			pod := map[family]netip.Addr{ipv4: l.ptp.v4, ipv6: l.ptp.v6}[f]
			return c, l.ptp.do(func() error {
				d := net.Dialer{LocalAddr: &net.TCPAddr{IP: pod.AsSlice(), Port: 40000}, Timeout: long}
				c, err = d.Dial("tcp", netip.AddrPortFrom(f.endpoint(), 80).String())
				return err
			})
		}
		type instance struct {
			listener       net.Listener
			client, server net.Conn
		}
		before := map[family]instance{}
		for f, at := range map[family]netip.AddrPort{ipv4: gate4, ipv6: gate6} {
			ln, err := net.Listen("tcp", at.String())
			must(t, err)
			c, err := connect(f)
			must(t, err)
			must(t, c.SetDeadline(time.Now().Add(long)))
			server, err := ln.Accept()
			must(t, err)
			before[f] = instance{ln, c, server}
		}
		protect(t, fresh, nextTargets...)
		for f, i := range before {
			for _, state := range []string{"listening", "with a connection"} {
				fresh.cutEnded(t.Context())
				if _, err := io.WriteString(i.server, state+"\n"); err != nil {
					t.Error(err)
				}
				if got, err := bufio.NewReader(i.client).ReadString('\n'); got != state+"\n" {
					t.Errorf("%s: a connection to the instance before, which is %s: %q, %v", f.String(), state, got, err)
				}
				i.listener.Close()
			}
			must(t, i.server.(*net.TCPConn).SetLinger(0))
			i.server.Close()
			if _, err := i.client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("%s: the instance before has ended: %v", f.String(), err)
			}
			i.client.Close()
			if _, err := connect(f); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s: before it is noticed: %v", f.String(), err)
			}
			fresh.cutEnded(t.Context())
			c, err := connect(f)
			must(t, err)
			defer c.Close()
			if got, err := bufio.NewReader(c).ReadString('\n'); got != "gate:8255\n" {
				t.Errorf("%s: afterwards: %q, %v", f.String(), got, err)
			}
		}
	})
}

// An instance that does not know yet that there is a next one cuts nothing of that one's.
func TestKernelHandoverUnnoticed(t *testing.T) {
	kernelTest(t, func(t *testing.T) {
		l := newLab(t)
		dir := t.TempDir()
		at := func(port uint16) (to []netip.AddrPort) {
			return []netip.AddrPort{netip.AddrPortFrom(node4, port), netip.AddrPortFrom(node6, port)}
		}
		var second *Rules
		for port := uint16(8254); port <= 8256; port++ {
			r := newRules(t, "nft", Options{Guard: true, StateDir: dir})
			protect(t, r, at(port)...)
			if port == 8255 {
				second = r
			}
		}
		l.gates(8256)
		for _, f := range families() {
			c, got, err := l.ptp.open(netip.AddrPortFrom(f.endpoint(), 80))
			must(t, err)
			defer c.Close()
			if got != "gate:8256" {
				t.Errorf("%s: %q", f.String(), got)
			}
		}
		led := func() (n int) {
			for _, f := range families() {
				flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, netlink.InetFamily(f.af()))
				must(t, err)
				for _, flow := range flows {
					if flow.Reverse.SrcPort == 8256 {
						n++
					}
				}
			}
			return n
		}
		before := led()
		second.cutEnded(t.Context())
		if after := led(); before != 2 || after != before {
			t.Errorf("%d connections lead to the newest instance, then %d", before, after)
		}
		if !second.isSuperseded() {
			t.Error("it does not know yet")
		}
	})
}

// A daemon that uses the other back end than the one before it: what is left of that one's redirect leads nowhere.
func TestKernelOtherBackend(t *testing.T) {
	kernelTest(t, func(t *testing.T) {
		l := newLab(t)
		l.gates(8254)
		l.gates(8255)
		canaries(t, "nft")
		canaries(t, "legacy")
		dir := t.TempDir()
		for _, kinds := range [][2]string{{"nft", "legacy"}, {"legacy", "nft"}} {
			protect(t, newRules(t, kinds[0], Options{Guard: true, StateDir: dir}), targets...)
			fresh := newRules(t, kinds[1], Options{Guard: true, StateDir: dir})
			protect(t, fresh, nextTargets...)
			for _, f := range families() {
				for _, pod := range l.pods {
					if got, err := pod.dial(netip.AddrPortFrom(f.endpoint(), 80)); got != "gate:8255" {
						t.Errorf("from %s to %s, %s of the %s: got %q, %v", kinds[0], kinds[1], f.String(), pod.name, got, err)
					}
				}
				if text := run(t, commandOf(f, kinds[0])+"-save"); strings.Contains(text, chainName) || !strings.Contains(text, "canary") {
					t.Errorf("from %s to %s, %s: the first one holds\n%s", kinds[0], kinds[1], f.String(), text)
				}
			}
			must(t, fresh.Remove(t.Context()))
		}
	})
}

// Another agent changes the same parents all the time.
func TestKernelChurn(t *testing.T) {
	kernelTest(t, func(t *testing.T) {
		l := newLab(t)
		l.gates(8254)
		l.gates(8255)
		for _, kind := range kinds {
			x := commandOf(ipv4, kind)
			ctx, cancel := context.WithCancel(t.Context())
			var agent sync.WaitGroup
			var changes int
			agent.Go(func() {
				for ; ctx.Err() == nil; changes++ {
					run(t, x+" -w -t nat -A PREROUTING -p udp -m comment --comment churn -j ACCEPT")
					run(t, x+" -w -t nat -D PREROUTING -p udp -m comment --comment churn -j ACCEPT")
				}
			})
			r := newRules(t, kind, Options{Guard: true})
			must(t, r.EnsureGuard(t.Context()))
			for i := range 10 {
				must(t, r.EnsureRedirect(t.Context(), [][]netip.AddrPort{targets, nextTargets}[i%2]))
				must(t, r.Verified())
			}
			cancel()
			agent.Wait()
			t.Logf("%s: 10 installations beside %d changes", kind, 2*changes)
			must(t, r.EnsureRedirect(t.Context(), targets))
			l.refused(kind, "gate:8254")
			began := time.Now()
			for range 10 {
				r.verifyRedirect(t.Context())
			}
			t.Logf("%s: a verification takes %v", kind, time.Since(began)/10)
			must(t, r.Verified())
			must(t, r.Remove(t.Context()))
			l.unprotected(kind + ", after Remove")
		}
	})
}

// Somebody holds the xtables lock: waited for, never fatal, and no reason to outlast a context.
func TestKernelLockHeld(t *testing.T) {
	kernelTest(t, func(t *testing.T) {
		l := newLab(t)
		l.gates(8254)
		lock, err := os.OpenFile(os.Getenv("XTABLES_LOCKFILE"), os.O_CREATE|os.O_RDWR, 0o600)
		must(t, err)
		defer lock.Close()
		must(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX))
		r := newRules(t, "legacy", Options{Guard: true, StateDir: t.TempDir()})
		must(t, r.EnsureGuard(t.Context()))
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		began := time.Now()
		if err := r.EnsureRedirect(ctx, targets); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("with the lock held: %v", err)
		}
		if d := time.Since(began); d > 2*time.Second {
			t.Errorf("a held lock kept EnsureRedirect for %v", d)
		}
		l.refused("while the lock is held", "")
		done := make(chan error)
		go func() { done <- r.EnsureRedirect(t.Context(), targets) }()
		select {
		case err := <-done:
			t.Fatalf("it did not wait for the lock: %v", err)
		case <-time.After(1500 * time.Millisecond): // longer than one wait of iptables
		}
		must(t, unix.Flock(int(lock.Fd()), unix.LOCK_UN))
		must(t, <-done)
		l.refused("after the lock", "gate:8254")
		// The commit waits too, not the listing before it alone.
		must(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX))
		go func() { done <- r.backends[ipv4].restore(t.Context(), r.want[ipv4].tables()[1].restore(listing{})) }()
		select {
		case err := <-done:
			t.Fatalf("iptables-restore did not wait for the lock: %v", err)
		case <-time.After(300 * time.Millisecond):
		}
		must(t, unix.Flock(int(lock.Fd()), unix.LOCK_UN))
		must(t, <-done)
		// A repair that waits does not hold up the guard's, nor the end of Run.
		must(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX))
		stop := start(t, r)
		r.wake.raise()
		run(t, "ip rule flush")
		for _, f := range families() {
			must(t, ruleOp{del: true, rule: guardRules(f, 0)[2]}.apply(f))
		}
		eventually(t, 5*time.Second, "the guard is repaired while the lock is held", func() bool {
			for _, f := range families() {
				have, err := listRules(f)
				must(t, err)
				if guardDefect(f, 0, have) != nil {
					return false
				}
			}
			return true
		})
		stop()
	})
}

// withCapabilities runs f, and the commands it starts, with these capabilities alone.
func withCapabilities(f func() error, keep ...int) error {
	return onThread(func() error {
		var set [2]unix.CapUserData
		for c := range unix.CAP_LAST_CAP + 1 {
			if slices.Contains(keep, c) {
				set[c/32].Effective |= 1 << (c % 32)
				set[c/32].Permitted |= 1 << (c % 32)
			} else if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil {
				return err
			}
		}
		if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &set[0]); err != nil {
			return err
		}
		return f()
	})
}

// The rights that the chart gives are enough, for both back ends and for the one that PATH offers; so is a node that has IPv6 in
// its kernel but switched off.
func TestKernelCapabilities(t *testing.T) {
	kernelTest(t, func(t *testing.T) {
		l := newLab(t)
		l.gates(8254)
		must(t, os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0o644))
		for _, kind := range append(kinds, "") {
			r := newRules(t, kind, Options{Guard: true, StateDir: t.TempDir()})
			must(t, withCapabilities(func() error {
				return errors.Join(r.EnsureGuard(t.Context()), r.EnsureRedirect(t.Context(), []netip.AddrPort{gate4}), r.Verified())
			}, unix.CAP_NET_ADMIN, unix.CAP_NET_RAW))
			l.refused(kind, "gate:8254", ipv4)
			must(t, withCapabilities(func() error { return r.Remove(t.Context()) }, unix.CAP_NET_ADMIN, unix.CAP_NET_RAW))
			if got, err := l.ptp.dial(netip.AddrPortFrom(ipv4.endpoint(), 80)); got != "real" {
				t.Errorf("%q: after Remove: %q, %v", kind, got, err)
			}
		}
	})
}

// Without the rights, and without a place for the state: errors that name the fix.
func TestKernelErrorsNameTheFix(t *testing.T) {
	kernelTest(t, func(t *testing.T) {
		l := newLab(t)
		r := newRules(t, "nft", Options{Guard: true, StateDir: filepath.Join(t.TempDir(), "missing")})
		must(t, r.EnsureGuard(t.Context()))
		if err := r.EnsureRedirect(t.Context(), targets); err == nil || !strings.Contains(err.Error(), "-state-dir") {
			t.Errorf("without a state directory: %v", err)
		}
		if err := r.Verified(); err == nil {
			t.Error("Verified after a failure")
		}
		l.refused("after a failure", "")
		if err := r.EnsureRedirect(t.Context(), []netip.AddrPort{netip.MustParseAddrPort("10.0.0.77:8254")}); err == nil || !strings.Contains(err.Error(), "-host-ip") {
			t.Errorf("a target that is not the node's: %v", err)
		}
		// It fails at the last step: it is not the owner, and repairs nothing that the owner may have put back.
		dir := t.TempDir()
		must(t, os.MkdirAll(filepath.Join(dir, generationFile+".new", "x"), 0o700)) // an empty one would be removed
		r = newRules(t, "nft", Options{Guard: true, StateDir: dir})
		must(t, r.EnsureGuard(t.Context()))
		if err := r.EnsureRedirect(t.Context(), targets); err == nil {
			t.Error("EnsureRedirect without ownership")
		}
		run(t, "iptables-nft -t nat -F IMDSGATE")
		r.verifyRedirect(t.Context())
		if text := run(t, "iptables-nft -t nat -S IMDSGATE"); strings.Contains(text, "DNAT") {
			t.Errorf("repaired without ownership: %s", text)
		}
		for _, kind := range kinds {
			r := newRules(t, kind, Options{Guard: true})
			r.priority = 7
			err := withCapabilities(func() error {
				if err := r.EnsureGuard(context.Background()); err == nil || !strings.Contains(err.Error(), "capability NET_ADMIN") {
					t.Errorf("EnsureGuard without rights: %v", err)
				}
				if err := r.EnsureRedirect(context.Background(), targets); err == nil || !strings.Contains(err.Error(), "NET_ADMIN") {
					t.Errorf("%s: EnsureRedirect without rights: %v", kind, err)
				}
				return nil
			})
			must(t, err)
		}
	})
}
