package iptables

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// chainName is our chain, in both tables.
const chainName = "IMDSGATE"

// table is what one of iptables' tables must hold: our chain, and a jump to it ahead of everything else in the parent.
type table struct {
	name, parent string
	rules        []string // of our chain, as iptables -S prints them
}

// listing is what a table does hold.
type listing struct {
	parent []string // rules of the parent
	chain  []string // rules of our chain
	exists bool     // our chain
}

// redirect is the wanted state of one family.
type redirect struct {
	iface         string // -i, "!" negates
	to            netip.AddrPort
	previous      netip.AddrPort // where the instance before this one listens until it ends: its port stays locked
	previousEnded bool           // and what led to it is cut
}

// tables returns filter before nat, the order of installation: the port is locked before anything leads to it.
func (d redirect) tables() []table {
	f := familyOf(d.to.Addr())
	endpoint := netip.PrefixFrom(f.endpoint(), f.endpoint().BitLen())
	lock := table{name: "filter", parent: "INPUT"}
	for _, to := range []netip.AddrPort{d.to, d.previous} {
		if !to.IsValid() {
			continue
		}
		port := fmt.Sprintf("-A %s -d %s -p tcp -m tcp --dport %d ", chainName, netip.PrefixFrom(to.Addr(), f.endpoint().BitLen()), to.Port())
		lock.rules = append(lock.rules,
			port+"-m conntrack --ctorigdst "+f.endpoint().String()+" -j ACCEPT",
			port+"-j REJECT --reject-with tcp-reset")
	}
	iface := ""
	if name, not := strings.CutPrefix(d.iface, "!"); not {
		iface = "! -i " + name + " "
	} else if name != "" {
		iface = "-i " + name + " "
	}
	nat := table{name: "nat", parent: "PREROUTING", rules: []string{fmt.Sprintf(
		"-A %s -d %s %s-p tcp -m tcp --dport 80 -j DNAT --to-destination %s", chainName, endpoint, iface, d.to)}}
	return []table{lock, nat}
}

// ourTables are the tables without their content, for looking and removing.
func ourTables() []table {
	return []table{{name: "filter", parent: "INPUT"}, {name: "nat", parent: "PREROUTING"}}
}

// target finds where a listed nat chain leads.
func (l listing) target() netip.AddrPort {
	for _, rule := range l.chain {
		if _, to, ok := strings.Cut(rule, "--to-destination "); ok {
			to, _, _ = strings.Cut(to, " ")
			if ap, err := netip.ParseAddrPort(to); err == nil {
				return ap
			}
		}
	}
	return netip.AddrPort{}
}

// jump is the rule of the parent that leads to our chain.
func (t table) jump() string {
	return fmt.Sprintf("-A %s -m comment --comment imdsgate -j %s", t.parent, chainName)
}

// jumps returns the indexes of the parent's rules that lead to our chain.
func (l listing) jumps() (at []int) {
	for i, rule := range l.parent {
		for _, option := range canonical(rule) {
			if option == "-j "+chainName || option == "-g "+chainName {
				at = append(at, i)
			}
		}
	}
	return at
}

// Our chain and jump are there, but other agents' rules stand before the jump.
var (
	errDisplaced = errors.New("another rule stands before the jump")                       // and leaves the endpoint alone
	errTaken     = errors.New("another rule takes the endpoint's packets before the jump") // or may: it names the endpoint
)

// defect says what the table lacks; nil when it is exactly as wanted. It wraps errDisplaced or errTaken when nothing but the
// order is wrong.
func (t table) defect(have listing, endpoint netip.Addr) error {
	wrong := func(format string, a ...any) error {
		return fmt.Errorf("table "+t.name+": "+format, a...)
	}
	if !have.exists {
		return wrong("chain %s is missing", chainName)
	}
	if !slices.EqualFunc(have.chain, t.rules, sameRule) {
		return wrong("chain %s holds %q, not %q", chainName, have.chain, t.rules)
	}
	at := have.jumps()
	switch {
	case len(at) == 0:
		return wrong("%s has no jump to %s", t.parent, chainName)
	case len(at) > 1 || !sameRule(have.parent[at[0]], t.jump()):
		return wrong("%s must have one plain jump to %s", t.parent, chainName)
	case at[0] == 0:
		return nil
	}
	for _, rule := range have.parent[:at[0]] {
		if strings.Contains(rule, endpoint.String()) {
			return wrong("%w: %q", errTaken, rule)
		}
	}
	return wrong("%w: %q", errDisplaced, have.parent[0])
}

// restore returns the lines for iptables-restore --noflush that make the table as wanted, whatever it holds: the chain is
// emptied and filled, and a wrong jump replaced, in one commit.
func (t table) restore(have listing) string {
	var b strings.Builder
	fmt.Fprintf(&b, "*%s\n:%s - [0:0]\n", t.name, chainName)
	for _, rule := range t.rules {
		fmt.Fprintln(&b, rule)
	}
	at := have.jumps()
	if len(at) != 1 || at[0] != 0 || !sameRule(have.parent[0], t.jump()) {
		t.deleteJumps(&b, have)
		fmt.Fprintln(&b, strings.Replace(t.jump(), "-A "+t.parent, "-I "+t.parent+" 1", 1))
	}
	b.WriteString("COMMIT\n")
	return b.String()
}

// remove returns the lines that take our chain and the jumps to it out of the table; none if there is nothing of ours.
func (t table) remove(have listing) string {
	if !have.exists && len(have.jumps()) == 0 {
		return ""
	}
	var b strings.Builder
	fmt.Fprintf(&b, "*%s\n:%s - [0:0]\n", t.name, chainName)
	t.deleteJumps(&b, have)
	fmt.Fprintf(&b, "-X %s\nCOMMIT\n", chainName)
	return b.String()
}

func (t table) deleteJumps(b *strings.Builder, have listing) {
	for _, i := range have.jumps() {
		fmt.Fprintln(b, strings.Replace(have.parent[i], "-A ", "-D ", 1))
	}
}

// sameRule compares rules as iptables prints them, which differs with version and back end: -m is implied by its options, /32
// and /128 by the address, and the order of the options means nothing.
func sameRule(a, b string) bool { return slices.Equal(canonical(a), canonical(b)) }

// canonical splits a rule into its sorted options, each with its arguments and negation.
func canonical(rule string) []string {
	var options []string
	not := ""
	for word := range strings.FieldsSeq(rule) {
		word = strings.Trim(word, `"`)
		switch {
		case word == "!":
			not = "! "
		case strings.HasPrefix(word, "-"):
			options, not = append(options, not+word), ""
		case len(options) == 0:
			options, not = append(options, not+word), ""
		default:
			word = strings.TrimSuffix(strings.TrimSuffix(word, "/128"), "/32")
			options[len(options)-1] += " " + not + word
			not = ""
		}
	}
	options = slices.DeleteFunc(options, func(o string) bool { return strings.HasPrefix(o, "-m ") })
	slices.Sort(options)
	return options
}
