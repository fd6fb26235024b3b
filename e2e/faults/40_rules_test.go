package faults

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"
)

const noRedirect = "the redirect was not there, the guard refuses"

// Somebody changes the rules. The guard refuses what the redirect does not take, and within two seconds it takes it again: nftables
// tells of every change.
func TestFaultRules(t *testing.T) {
	for _, c := range []struct {
		name    string
		node    int
		command string
		after   string // undoes what is not ours to undo
		fails   bool   // requests may
		flushes bool   // what others have, too
	}{
		{name: "iptables -F", node: 1, command: "iptables -t nat -F; iptables -F", fails: true, flushes: true},
		{name: "nft flush ruleset", node: 2, command: "nft flush ruleset", fails: true, flushes: true},
		{name: "chain edited", node: 1, command: "iptables -t nat -I IMDSGATE -p udp -j RETURN; iptables -F IMDSGATE"},
		{
			name: "jump displaced", node: 1, command: "iptables -t nat -N OTHER; iptables -t nat -I PREROUTING -j OTHER",
			after: "iptables -t nat -D PREROUTING -j OTHER; iptables -t nat -X OTHER",
		},
		{
			name: "endpoint taken", node: 2, fails: true, // the other one: who insists on the first place gets it for 30 s
			command: "iptables -t nat -I PREROUTING -d 169.254.169.254/32 -p tcp --dport 80 -j DNAT --to-destination 172.30.0.12:8181",
			after:   "iptables -t nat -D PREROUTING -d 169.254.169.254/32 -p tcp --dport 80 -j DNAT --to-destination 172.30.0.12:8181",
		},
		{
			name: "firewall reloaded", node: 1, fails: true,
			command: "iptables-save | grep -v IMDSGATE >/run/others; iptables -t nat -F; iptables -F; iptables-restore </run/others; rm /run/others",
		},
		{name: "ip rule flush", node: 1, command: `
ip rule flush; ip rule add pref 32766 lookup main; ip rule add pref 32767 lookup default
ip -6 rule flush; ip -6 rule add pref 32766 lookup main`},
		{name: "guard deleted", node: 1, command: `
ip rule del pref 0 to 169.254.169.254 unreachable; sleep 0.5
ip rule del pref 0 to 169.254.169.254 iif lo goto 1; sleep 0.5
ip rule del pref 1 nop; sleep 0.5
ip -6 rule del pref 0 to fd00:ec2::254 unreachable`},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := shared.fault(t, c.name, 2*time.Minute, []int{c.node})
			before, repairs := f.rulesOf(c.node, "iptables"), f.repairs(c.node)
			if c.flushes {
				defer f.keepOthers(c.node, "nat filter")()
			}
			if c.after != "" {
				t.Cleanup(func() {
					if said := f.onNodeNow(c.node, c.after); said != "" {
						t.Error(said)
					}
				})
			}
			f.strikes(c.node, c.command)
			f.restored(c.node, "iptables", before)
			f.wait("a repair that is counted", func() error {
				if n := f.repairs(c.node); n <= repairs {
					return fmt.Errorf("the daemon has repaired %d times, before and after", n)
				}
				return nil
			})
			e := expect{whole: 2 * time.Second}
			if c.name == "guard deleted" {
				e.whole += 1500 * time.Millisecond // it takes that long to delete
			}
			if c.fails {
				e.why, e.kinds = noRedirect, closed
			}
			f.done(e)
		})
	}
}

// keepOthers returns how to put back what kube-proxy has of rules: it looks at them as a whole once in an hour, and without them
// nothing on the node finds the API server by the address of its service. tables are those of iptables that are emptied.
func (f *fault) keepOthers(node int, tables string) func() {
	f.Helper()
	f.onNode(node, "for t in "+tables+"; do iptables-save -t $t; done | grep -v IMDSGATE >/run/others.iptables"+`
: >/run/others.nft; for t in ip ip6; do ! nft list table $t kube-proxy >/run/one 2>/dev/null || { echo "table $t kube-proxy; delete table $t kube-proxy"; cat /run/one; } >>/run/others.nft; done`)
	return func() {
		f.Helper()
		f.onNode(node, "iptables-restore -n </run/others.iptables && nft -f /run/others.nft; rm -f /run/others.* /run/one")
	}
}

// repairs is how often the daemon of a node says that it has put rules right.
func (f *fault) repairs(node int) (n int) {
	f.Helper()
	out := f.onNode(node, fmt.Sprintf("curl -sSf -m3 --retry 10 --retry-delay 1 --retry-connrefused http://%s:9181/metrics", f.Node(node).IP()))
	for _, what := range []string{"guard", "redirect"} {
		_, after, ok := strings.Cut(out, fmt.Sprintf("\nimdsgate_repairs_total{what=%q} ", what))
		text, _, _ := strings.Cut(after, "\n")
		count, err := strconv.Atoi(text)
		if !ok || err != nil {
			f.Fatalf("no imdsgate_repairs_total of the %s: %v", what, err)
		}
		n += count
	}
	return n
}

// The lock of iptables, held by somebody. nft does not take it: nothing of ours waits.
func TestFaultXtablesLockNFT(t *testing.T) {
	f := shared.fault(t, "xtables lock held, nft", 2*time.Minute, []int{1})
	before := f.rulesOf(1, "iptables")
	defer f.keepOthers(1, "nat")()
	f.strikes(1, "flock -o /run/xtables.lock sleep 30 >/dev/null 2>&1 & sleep 0.2; iptables -t nat -F")
	f.restored(1, "iptables", before)
	f.done(expect{why: noRedirect, kinds: closed, whole: 3 * time.Second})
	f.onNode(1, "flock /run/xtables.lock true")
}

// Back end legacy, which tells of nothing: a flush is found at the next interval.
func TestFaultLegacy(t *testing.T) {
	shared.needs(t, true)
	shared.reinstall(t, "--set", "iptables=legacy")
	t.Cleanup(func() {
		shared.reinstall(t)
		// Without NET_RAW, which nft does not need, the daemon cannot see what is left of legacy. Nobody else here uses it.
		for _, node := range both {
			for _, table := range []string{"nat", "filter"} {
				for _, op := range []string{"-F", "-X"} {
					if _, err := shared.Node(node).Run(context.WithoutCancel(t.Context()), "iptables-legacy", "-t", table, op); err != nil {
						t.Error(err)
					}
				}
			}
		}
	})
	// Whoever flushes takes the lock as well, unless told of another one.
	const flush = "export XTABLES_LOCKFILE=/run/flush.lock; iptables-legacy -t nat -F; iptables-legacy -F"
	for _, c := range []struct {
		name, command string
		within        time.Duration
	}{
		{"iptables-legacy -F", flush, 31 * time.Second},
		// It is found within 30 s, and put right when the lock is free.
		{"xtables lock held, legacy", "flock -o /run/xtables.lock sleep 30 >/dev/null 2>&1 & sleep 0.2; " + flush, 33 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := shared.fault(t, c.name, 2*time.Minute, []int{1})
			before := f.rulesOf(1, "iptables-legacy")
			f.strikes(1, c.command)
			f.restored(1, "iptables-legacy", before)
			f.done(expect{why: noRedirect, kinds: closed, whole: c.within})
			f.onNode(1, "flock /run/xtables.lock true")
		})
	}
}
