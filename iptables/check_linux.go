package iptables

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Severity says how bad a Finding is.
type Severity string

// The severities.
const (
	Info    Severity = "info"    // as it should be, or good to know
	Warning Severity = "warning" // works, but not as it should
	Error   Severity = "error"   // pods may reach the endpoint, or cannot reach us
)

// Finding is one result of Check.
type Finding struct {
	Severity Severity
	Subject  string // guard, redirect, iptables, rules
	Family   string // ipv4 or ipv6
	Text     string
	Fix      string // what to do; empty: nothing
}

// Check looks at what is on the node, whoever put it there, and changes nothing.
func (r *Rules) Check(ctx context.Context) []Finding {
	var all []Finding
	for _, f := range families() {
		report := func(s Severity, subject, fix, format string, a ...any) {
			all = append(all, Finding{s, subject, f.String(), fmt.Sprintf(format, a...), fix})
		}
		r.checkGuard(f, report)
		r.checkRedirect(ctx, f, report)
	}
	return all
}

type report func(s Severity, subject, fix, format string, a ...any)

func (r *Rules) checkGuard(f family, report report) {
	have, err := listRules(f)
	switch {
	case errors.Is(err, errNoFamily):
		report(Info, "guard", "", "%v", err)
		return
	case err != nil:
		report(Error, "guard", "give the container the capability NET_ADMIN", "%v", err)
		return
	}
	refuse := guardRules(f, r.priority)[2]
	switch err := guardDefect(f, r.priority, have); {
	case err == nil:
		report(Info, "guard", "", "in place at priority %d", r.priority)
	case !r.guard:
		report(Warning, "guard", "leave -guard on unless something else keeps pods from the endpoint", "not in place, and switched off")
	default:
		report(Error, "guard", "start imdsgate on this node once", "%v", err)
	}
	at := slices.IndexFunc(have, refuse.like)
	if at < 0 { // as if it were there: behind all of its priority
		for at = 0; at < len(have) && have[at].priority <= refuse.priority; at++ {
		}
	}
	for _, rule := range have[:at] {
		checkRule(f, rule, report)
	}
	checkStrict(have, report)
}

// checkRule reports a foreign rule that is asked before the guard.
func checkRule(f family, rule ipRule, report report) {
	fix := "give it a later priority, or the guard an earlier one (-guard-priority)"
	if rule.ours(f) || rule.dst.IsValid() && !rule.dst.Contains(f.endpoint()) && !rule.invert || rule.iif == "lo" && !rule.invert {
		return
	}
	switch rule.action {
	case nl.FR_ACT_TO_TBL:
		covers, err := tableCovers(f, rule.table)
		switch {
		case err != nil:
			report(Warning, "rules", fix, "cannot tell whether rule %q beats the guard: %v", rule, err)
		case covers:
			report(Error, "rules", fix, "rule %q beats the guard: its table has a route to the endpoint", rule)
		case rule.table != unix.RT_TABLE_LOCAL:
			report(Warning, "rules", fix, "rule %q comes before the guard: it beats it as soon as its table gets a route to the endpoint", rule)
		}
	case nl.FR_ACT_GOTO:
		report(Warning, "rules", fix, "rule %q jumps over the guard", rule)
	case nl.FR_ACT_UNREACHABLE, nl.FR_ACT_BLACKHOLE, nl.FR_ACT_PROHIBIT:
		if !rule.narrow && !rule.src.IsValid() && rule.iif == "" {
			report(Warning, "rules", "remove it", "rule %q refuses the node itself, and imdsgate with it", rule)
		}
	}
}

// checkStrict reports the strict mode of the Amazon VPC CNI's security groups for pods: such a pod's packets, those to the node
// included, leave by its own network interface before the local table is asked. The redirect cannot work; the guard holds.
func checkStrict(have []ipRule, report report) {
	local := slices.IndexFunc(have, func(r ipRule) bool { return r.action == nl.FR_ACT_TO_TBL && r.table == unix.RT_TABLE_LOCAL })
	if local < 0 {
		return
	}
	for _, rule := range have[:local] {
		if rule.action == nl.FR_ACT_TO_TBL && rule.iif != "" && rule.iif != "lo" && rule.table != unix.RT_TABLE_LOCAL {
			report(Warning, "rules", "POD_SECURITY_GROUP_ENFORCING_MODE=standard in the aws-node DaemonSet",
				"rule %q is asked before the local table: pods with security groups in strict mode are refused, not served", rule)
			return
		}
	}
}

// tableCovers reports whether a routing table has a route that takes the endpoint's packets.
func tableCovers(f family, table uint32) (bool, error) {
	var routes []netlink.Route
	err := whole(func() (err error) {
		routes, err = netlink.RouteListFiltered(int(f.af()), &netlink.Route{Table: int(table)}, netlink.RT_FILTER_TABLE)
		return err
	})
	if err != nil {
		return false, fmt.Errorf("list the routes of table %d: %w", table, err)
	}
	for _, route := range routes {
		if route.Type == unix.RTN_UNREACHABLE || route.Type == unix.RTN_BLACKHOLE || route.Type == unix.RTN_PROHIBIT || route.Type == unix.RTN_THROW {
			continue
		}
		if route.Dst == nil || route.Dst.Contains(f.endpoint().AsSlice()) {
			return true, nil
		}
	}
	return false, nil
}

func (r *Rules) checkRedirect(ctx context.Context, f family, report report) {
	own := ""
	if b, err := probe(ctx, f, commandOf(f, r.kind)); err != nil {
		report(Error, "iptables", "", "%v", err)
	} else {
		own = b.mode
		report(Info, "iptables", "", "%s uses the back end %s", b.command, b.mode)
	}
	found := false
	for _, b := range backends(ctx, f) {
		lines, err := b.dump(ctx, "nat")
		if err != nil && b.mode != own && own != "" { // NET_RAW, which legacy needs, is not for a daemon that uses nft
			report(Warning, "redirect", fmt.Sprintf("on the node, %s-save -t nat shows them: if one names %s, delete it, or use that back end too (chart: iptables)", b.command, f.endpoint()),
				"rules of the other back end (%s) cannot be read, and one that takes the endpoint may be asked before ours: %v", b.mode, err)
			continue
		}
		if err != nil {
			report(Error, "iptables", "", "%v", err)
			continue
		}
		for _, line := range lines {
			if foreignNAT(f, line) {
				report(Error, "redirect", "uninstall kube2iam, kiam or whatever made it, and delete the rule",
					"a foreign rule (%s) takes the endpoint: %q", b.mode, line)
			}
		}
		nat, err := b.list(ctx, ourTables()[1])
		if err != nil {
			report(Error, "iptables", "", "%v", err)
			continue
		}
		to := nat.target()
		if !nat.exists && len(nat.jumps()) == 0 {
			continue
		}
		found = true
		if !to.IsValid() {
			report(Error, "redirect", "restart imdsgate on this node", "chain %s (%s) leads nowhere: %q", chainName, b.mode, nat.chain)
			continue
		}
		r.checkTarget(ctx, b, to, report)
	}
	if !found {
		report(Warning, "redirect", "", "not in place: pods are refused, not served (expected without -redirect iptables, without an address in -host-ip, or before the first start)")
	}
}

// checkTarget reports on a redirect that leads somewhere.
func (r *Rules) checkTarget(ctx context.Context, b *backend, to netip.AddrPort, report report) {
	node, err := nodeAddrs()
	if err == nil {
		err = onNode(to.Addr(), node)
	}
	if err != nil {
		report(Error, "redirect", "set -host-ip to an address of the node", "%v", err)
	}
	d := redirect{iface: r.iface, to: to}
	if lock, err := b.list(ctx, ourTables()[0]); err == nil { // the previous instance's port may still be locked
		for _, p := range lockedPorts(lock) {
			if p != to {
				d.previous = p
			}
		}
	}
	defects, _, err := inspect(ctx, b, d)
	switch {
	case err != nil:
		report(Error, "iptables", "", "%v", err)
	case len(defects) == 0:
		report(Info, "redirect", "", "in place (%s), leads to %s", b.mode, to)
	case onlyOrder(defects):
		report(Warning, "redirect", "find out which agent insists on the first place", "%v", errors.Join(defects...))
	default:
		report(Error, "redirect", "restart imdsgate on this node, or look who removes its rules", "%v", errors.Join(defects...))
	}
}

// foreignNAT reports whether a rule of the nat table, not one of ours, rewrites the endpoint's packets.
func foreignNAT(f family, line string) bool {
	if strings.HasPrefix(line, "-A "+chainName+" ") {
		return false
	}
	names, rewrites := false, false
	for _, option := range canonical(line) {
		names = names || option == "-d "+f.endpoint().String()
		rewrites = rewrites || option == "-j DNAT" || option == "-j REDIRECT"
	}
	return names && rewrites
}

// lockedPorts returns the ports that a filter chain of ours locks.
func lockedPorts(l listing) []netip.AddrPort {
	var ports []netip.AddrPort
	for _, rule := range l.chain {
		var ip, port string
		for _, option := range canonical(rule) {
			if v, ok := strings.CutPrefix(option, "-d "); ok {
				ip = v
			}
			if v, ok := strings.CutPrefix(option, "--dport "); ok {
				port = v
			}
		}
		if p, err := netip.ParseAddrPort(net.JoinHostPort(ip, port)); err == nil {
			ports = append(ports, p)
		}
	}
	return ports
}
