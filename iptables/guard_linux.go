package iptables

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// RuleProtocol tags the guard's routing rules: `ip rule add … protocol 169`. A unit that closes the endpoint at boot uses
// it too, so that -cleanup knows its rules. No routing daemon in rt_protos has it.
const RuleProtocol = 169

// ipRule is a policy-routing rule: what the guard's rules need and what decides whether another one beats them. It is
// comparable: two rules are the same when they are equal.
type ipRule struct {
	priority uint32
	action   uint8 // nl.FR_ACT_*
	dst, src netip.Prefix
	iif      string
	target   uint32 // of a goto
	table    uint32
	protocol uint8
	invert   bool
	narrow   bool // has a further condition (mark, ports, oif, …)
}

// guardRules are the three rules in the order of their installation: goto finds its target, and what the node sends is let
// through before everybody else is refused.
func guardRules(f family, priority uint32) []ipRule {
	endpoint := netip.PrefixFrom(f.endpoint(), f.endpoint().BitLen())
	return []ipRule{
		{priority: priority + 1, action: nl.FR_ACT_NOP, protocol: RuleProtocol},
		{priority: priority, action: nl.FR_ACT_GOTO, dst: endpoint, iif: "lo", target: priority + 1, protocol: RuleProtocol},
		{priority: priority, action: nl.FR_ACT_UNREACHABLE, dst: endpoint, protocol: RuleProtocol},
	}
}

// standIn refuses in unreachable's place while that moves behind goto. It is another rule, so that no deletion can hit the wrong
// one of two, whatever others do to the rules meanwhile.
func standIn(refuse ipRule) ipRule {
	refuse.action = nl.FR_ACT_PROHIBIT
	return refuse
}

// like reports whether two rules do the same to packets, whoever made them. The kernel refuses a second rule that differs
// in its protocol alone.
func (r ipRule) like(o ipRule) bool {
	r.protocol = o.protocol
	return r == o
}

// ours reports whether the guard made the rule, at this or another priority: a full match but for the priority.
func (r ipRule) ours(f family) bool {
	p := r.priority
	if r.action == nl.FR_ACT_NOP {
		p--
	}
	rules := guardRules(f, p)
	return slices.Contains(append(rules, standIn(rules[2])), r)
}

func (r ipRule) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d:", r.priority)
	if r.invert {
		b.WriteString(" not")
	}
	if r.src.IsValid() {
		fmt.Fprintf(&b, " from %s", r.src)
	}
	if r.dst.IsValid() {
		fmt.Fprintf(&b, " to %s", r.dst)
	}
	if r.iif != "" {
		fmt.Fprintf(&b, " iif %s", r.iif)
	}
	if r.narrow {
		b.WriteString(" …")
	}
	switch r.action {
	case nl.FR_ACT_TO_TBL:
		fmt.Fprintf(&b, " lookup %d", r.table)
	case nl.FR_ACT_GOTO:
		fmt.Fprintf(&b, " goto %d", r.target)
	case nl.FR_ACT_NOP:
		b.WriteString(" nop")
	case nl.FR_ACT_UNREACHABLE:
		b.WriteString(" unreachable")
	case nl.FR_ACT_PROHIBIT:
		b.WriteString(" prohibit")
	default:
		fmt.Fprintf(&b, " action %d", r.action)
	}
	return b.String()
}

// ruleOp is one step of an installation, a repair or a removal.
type ruleOp struct {
	del  bool
	rule ipRule
}

func (o ruleOp) String() string {
	if o.del {
		return "del " + o.rule.String()
	}
	return "add " + o.rule.String()
}

// planGuard returns the next steps towards a whole guard, given the kernel's rules in its order; none when it is whole. A new rule
// goes behind those of the same priority. At every step the node reaches the endpoint if it did before, and from unreachable on
// nobody else.
func planGuard(f family, priority uint32, have []ipRule) []ruleOp {
	want := guardRules(f, priority)
	nop, jump, refuse := want[0], want[1], want[2]
	var ops []ruleOp
	if !slices.ContainsFunc(have, nop.like) {
		ops = append(ops, ruleOp{rule: nop})
	}
	j := slices.IndexFunc(have, jump.like)
	if j < 0 {
		ops, j = append(ops, ruleOp{rule: jump}), len(have)
	}
	late := slices.ContainsFunc(have[j:], refuse.like)
	other := standIn(refuse)
	stands := slices.Contains(have, other)
	// An unreachable of ours before goto cuts the node off. It moves behind.
	for _, r := range have[:j] {
		if r != refuse {
			continue
		}
		if !stands {
			ops, stands = append(ops, ruleOp{rule: other}), true
		}
		ops = append(ops, ruleOp{del: true, rule: refuse})
	}
	if !late {
		return append(ops, ruleOp{rule: refuse})
	}
	if stands { // and unreachable was seen in its place
		ops = append(ops, ruleOp{del: true, rule: other})
	}
	return ops
}

// planRemoval returns the steps that take away what the guard made, at any priority but those in keep.
func planRemoval(f family, have []ipRule, keep ...ipRule) []ruleOp {
	var ops []ruleOp
	for _, action := range []uint8{nl.FR_ACT_PROHIBIT, nl.FR_ACT_UNREACHABLE, nl.FR_ACT_GOTO, nl.FR_ACT_NOP} {
		for _, r := range have {
			if r.action == action && r.ours(f) && !slices.Contains(keep, r) {
				ops = append(ops, ruleOp{del: true, rule: r})
			}
		}
	}
	return ops
}

// guardDefect says what the guard lacks; nil when it is whole.
func guardDefect(f family, priority uint32, have []ipRule) error {
	ops := planGuard(f, priority, have)
	if len(ops) == 0 {
		return nil
	}
	return fmt.Errorf("the guard is not whole: ip rules need: %v", ops)
}

// errNoFamily: the kernel does not know the address family, so nobody reaches the endpoint through it.
var errNoFamily = errors.New("the kernel has no policy routing for this address family")

// listRules dumps the kernel's rules in the order of their evaluation.
func listRules(f family) ([]ipRule, error) {
	var rules []ipRule
	err := whole(func() error {
		req := nl.NewNetlinkRequest(unix.RTM_GETRULE, unix.NLM_F_DUMP)
		req.AddData(nl.NewIfInfomsg(int(f.af())))
		msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWRULE)
		if err != nil {
			return err
		}
		rules = make([]ipRule, 0, len(msgs))
		for _, m := range msgs {
			r, err := decodeRule(m)
			if err != nil {
				return err
			}
			if m[0] == f.af() { // a kernel without rules for the family may answer for all others
				rules = append(rules, r)
			}
		}
		return nil
	})
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, errNoFamily
	}
	if err != nil {
		return nil, fmt.Errorf("list %s routing rules: %w", f.String(), err)
	}
	return rules, nil
}

// apply does one step. A rule that is there already, or gone already, is a success.
func (o ruleOp) apply(f family) error {
	kind, flags := unix.RTM_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK
	if o.del {
		kind, flags = unix.RTM_DELRULE, unix.NLM_F_ACK
	}
	req := nl.NewNetlinkRequest(kind, flags)
	for _, d := range encodeRule(f, o.rule) {
		req.AddData(d)
	}
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	switch {
	case err == nil, o.del && errors.Is(err, unix.ENOENT), !o.del && errors.Is(err, unix.EEXIST):
		return nil
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("ip rule %s (%s): %w: give the container the capability NET_ADMIN", o, f.String(), err)
	}
	return fmt.Errorf("ip rule %s (%s): %w", o, f.String(), err)
}

// encodeRule writes a rule of the guard: struct fib_rule_hdr, which has the layout of struct rtmsg, and attributes.
func encodeRule(f family, r ipRule) []nl.NetlinkRequestData {
	u32 := func(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
	h := &nl.RtMsg{RtMsg: unix.RtMsg{Family: f.af(), Type: r.action}}
	data := []nl.NetlinkRequestData{h,
		nl.NewRtAttr(nl.FRA_PRIORITY, u32(r.priority)),
		nl.NewRtAttr(nl.FRA_PROTOCOL, []byte{r.protocol}),
	}
	if r.dst.IsValid() {
		h.Dst_len = pick[uint8](f, 32, 128)
		data = append(data, nl.NewRtAttr(nl.FRA_DST, r.dst.Addr().AsSlice()))
	}
	if r.iif != "" {
		data = append(data, nl.NewRtAttr(nl.FRA_IIFNAME, nl.ZeroTerminated(r.iif)))
	}
	if r.action == nl.FR_ACT_GOTO {
		data = append(data, nl.NewRtAttr(nl.FRA_GOTO, u32(r.target)))
	}
	return data
}

// attributes parses netlink attributes. The kernel pads each of them; without padding nl would read beyond the end.
func attributes(b []byte) ([]syscall.NetlinkRouteAttr, error) {
	if len(b)%unix.NLA_ALIGNTO != 0 {
		return nil, errors.New("attributes without padding")
	}
	return nl.ParseRouteAttr(b)
}

// decodeRule reads a rule with its action, which netlink.RuleList leaves out.
func decodeRule(msg []byte) (ipRule, error) {
	if len(msg) < unix.SizeofRtMsg {
		return ipRule{}, errors.New("short message")
	}
	h := nl.DeserializeRtMsg(msg)
	attrs, err := attributes(msg[unix.SizeofRtMsg:])
	if err != nil {
		return ipRule{}, err
	}
	const invert = 2 // FIB_RULE_INVERT
	r := ipRule{action: h.Type, table: uint32(h.Table), invert: h.Flags&invert != 0, narrow: h.Tos != 0}
	for _, a := range attrs {
		v := a.Value
		switch a.Attr.Type {
		case nl.FRA_PRIORITY, nl.FRA_GOTO, nl.FRA_TABLE, nl.FRA_SUPPRESS_PREFIXLEN, nl.FRA_SUPPRESS_IFGROUP:
			if len(v) < 4 {
				return ipRule{}, fmt.Errorf("short attribute %d", a.Attr.Type)
			}
			n := binary.NativeEndian.Uint32(v)
			switch a.Attr.Type {
			case nl.FRA_PRIORITY:
				r.priority = n
			case nl.FRA_GOTO:
				r.target = n
			case nl.FRA_TABLE:
				r.table = n
			default:
				r.narrow = r.narrow || n != 0xffffffff
			}
		case nl.FRA_DST, nl.FRA_SRC:
			ip, ok := netip.AddrFromSlice(v)
			if !ok {
				return ipRule{}, errors.New("malformed address")
			}
			if a.Attr.Type == nl.FRA_DST {
				r.dst = netip.PrefixFrom(ip, int(h.Dst_len))
			} else {
				r.src = netip.PrefixFrom(ip, int(h.Src_len))
			}
		case nl.FRA_IIFNAME:
			r.iif = strings.TrimRight(string(v), "\x00")
		case nl.FRA_PROTOCOL:
			if len(v) > 0 {
				r.protocol = v[0]
			}
		default:
			r.narrow = true
		}
	}
	return r, nil
}

// applyGuard runs the steps; before each it asks ctx, after each it calls the tests' hook.
func (r *Rules) applyGuard(ctx context.Context, f family, ops []ruleOp) error {
	for _, op := range ops {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := op.apply(f); err != nil {
			return err
		}
		if r.step != nil {
			r.step(f, op)
		}
	}
	return nil
}
