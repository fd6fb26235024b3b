package iptables

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// ruleList imitates the kernel: rules of one priority stand in the order of their addition, a deletion takes the first match.
type ruleList []ipRule

func (l ruleList) apply(op ruleOp) (ruleList, error) {
	if op.del {
		i := slices.Index(l, op.rule)
		if i < 0 {
			return l, fmt.Errorf("%s: no such rule", op)
		}
		return slices.Delete(slices.Clone(l), i, i+1), nil
	}
	if slices.ContainsFunc(l, op.rule.like) {
		return l, fmt.Errorf("%s: exists", op)
	}
	i := 0
	for i < len(l) && l[i].priority <= op.rule.priority {
		i++
	}
	return slices.Insert(slices.Clone(l), i, op.rule), nil
}

// refuses reports what becomes of a packet to the endpoint that came in by iif.
func (l ruleList) refuses(f family, iif string) bool {
	for i := 0; i < len(l); {
		r := l[i]
		i++
		if r.dst.IsValid() && !r.dst.Contains(f.endpoint()) || r.iif != "" && r.iif != iif {
			continue
		}
		switch r.action {
		case nl.FR_ACT_UNREACHABLE, nl.FR_ACT_PROHIBIT:
			return true
		case nl.FR_ACT_GOTO:
			if to := slices.IndexFunc(l, func(o ipRule) bool { return o.priority == r.target }); to >= 0 {
				i = to
			}
		}
	}
	return false
}

// rounds returns the steps of as many plans as it takes.
func rounds(t *testing.T, f family, priority uint32, l ruleList) (all []ruleOp) {
	t.Helper()
	for range 3 {
		for _, op := range planGuard(f, priority, l) {
			var err error
			if l, err = l.apply(op); err != nil {
				t.Fatal(err)
			}
			all = append(all, op)
		}
	}
	return all
}

// From any state, that of a repair that was broken off too, in any order, with other agents' rules between: the plan makes the guard
// whole; the node never loses the endpoint by it, and once pods are refused they stay so.
func TestPlanGuardHoldsAtEveryStep(t *testing.T) {
	for _, f := range families() {
		for _, priority := range []uint32{0, 1, 100} {
			want := guardRules(f, priority)
			foreign := want[0]
			foreign.protocol = unix.RTPROT_STATIC
			local := ipRule{action: nl.FR_ACT_TO_TBL, table: unix.RT_TABLE_LOCAL}
			pool := slices.Concat(want, []ipRule{standIn(want[2]), foreign, local, {priority: priority + 1, action: nl.FR_ACT_TO_TBL, table: 101, iif: "eni1"}})
			rnd := rand.New(rand.NewPCG(1, uint64(priority)))
			for range 2000 {
				var have ruleList
				for _, i := range rnd.Perm(len(pool))[:rnd.IntN(len(pool)+1)] {
					have, _ = have.apply(ruleOp{rule: pool[i]})
				}
				l := have
				for _, op := range rounds(t, f, priority, have) {
					cut, closed := l.refuses(f, "lo"), l.refuses(f, "eth1")
					var err error
					if l, err = l.apply(op); err != nil {
						t.Fatalf("from %v: %v", have, err)
					}
					if !cut && l.refuses(f, "lo") {
						t.Fatalf("from %v: %s cuts the node off: %v", have, op, l)
					}
					if closed && !l.refuses(f, "eth1") {
						t.Fatalf("from %v: %s opens the endpoint: %v", have, op, l)
					}
				}
				if !l.refuses(f, "eth1") || l.refuses(f, "lo") {
					t.Fatalf("from %v: not whole: %v", have, l)
				}
				if ops := planGuard(f, priority, l); len(ops) > 0 {
					t.Fatalf("from %v: then again %v", have, ops)
				}
				// And away again: the node is never cut off, and nothing but our rules goes.
				for _, op := range planRemoval(f, l) {
					var err error
					if l, err = l.apply(op); err != nil {
						t.Fatal(err)
					}
					if l.refuses(f, "lo") {
						t.Fatalf("removal, %s cuts the node off: %v", op, l)
					}
				}
				left := slices.DeleteFunc(slices.Clone(have), func(r ipRule) bool { return r.protocol == RuleProtocol })
				if d := cmp.Diff(fmt.Sprint(left), fmt.Sprint(l)); d != "" {
					t.Fatalf("from %v: foreign rules (-want +got):\n%s", have, d)
				}
			}
		}
	}
}

func TestPlanGuardSteps(t *testing.T) {
	want := guardRules(ipv4, 0)
	nop, jump, refuse := want[0], want[1], want[2]
	boot := func(r ipRule) ipRule { r.protocol = unix.RTPROT_BOOT; return r }
	for _, tc := range []struct {
		name string
		have []ipRule
		want []string
	}{
		{"nothing", nil, []string{"add 1: nop", "add 0: to 169.254.169.254/32 iif lo goto 1", "add 0: to 169.254.169.254/32 unreachable"}},
		{"whole", []ipRule{jump, refuse, nop}, nil},
		{"made at boot without the tag", []ipRule{boot(jump), boot(refuse), boot(nop)}, nil},
		{"nop first", []ipRule{refuse}, []string{"add 1: nop", "add 0: to 169.254.169.254/32 iif lo goto 1", "add 0: to 169.254.169.254/32 prohibit",
			"del 0: to 169.254.169.254/32 unreachable", "add 0: to 169.254.169.254/32 unreachable", "del 0: to 169.254.169.254/32 prohibit"}},
		{"wrong order", []ipRule{refuse, jump, nop}, []string{"add 0: to 169.254.169.254/32 prohibit",
			"del 0: to 169.254.169.254/32 unreachable", "add 0: to 169.254.169.254/32 unreachable", "del 0: to 169.254.169.254/32 prohibit"}},
		{"broken off", []ipRule{jump, standIn(refuse), nop}, []string{"add 0: to 169.254.169.254/32 unreachable", "del 0: to 169.254.169.254/32 prohibit"}},
		{"foreign unreachable in front", []ipRule{boot(refuse), jump, refuse, nop}, nil},
		{"another interface's", []ipRule{{dst: refuse.dst, action: refuse.action, iif: "eth0", protocol: RuleProtocol}, jump, nop}, []string{"add 0: to 169.254.169.254/32 unreachable"}},
		{"narrow", []ipRule{jump, {dst: refuse.dst, action: refuse.action, narrow: true, protocol: RuleProtocol}, nop}, []string{"add 0: to 169.254.169.254/32 unreachable"}},
	} {
		var got []string
		for _, op := range rounds(t, ipv4, 0, tc.have) {
			got = append(got, op.String())
		}
		if d := cmp.Diff(tc.want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, d)
		}
	}
}

func TestOnlyFullMatchesAreOurs(t *testing.T) {
	for _, f := range families() {
		for _, r := range slices.Concat(guardRules(f, 0), guardRules(f, 77)) {
			if !r.ours(f) {
				t.Errorf("not ours: %s", r)
			}
			for name, change := range map[string]func(*ipRule){
				"protocol":  func(r *ipRule) { r.protocol = unix.RTPROT_BOOT },
				"interface": func(r *ipRule) { r.iif = "eth0" },
				"source":    func(r *ipRule) { r.src = netip.MustParsePrefix("10.0.0.0/8") },
				"more":      func(r *ipRule) { r.narrow = true },
				"not":       func(r *ipRule) { r.invert = true },
				"action":    func(r *ipRule) { r.action = nl.FR_ACT_BLACKHOLE },
			} {
				other := r
				if change(&other); other.ours(f) {
					t.Errorf("another %s, still ours: %s", name, other)
				}
			}
		}
	}
}

func TestRulesAreReadBackAsWritten(t *testing.T) {
	for _, f := range families() {
		for _, want := range guardRules(f, 12) {
			var msg []byte
			for _, d := range encodeRule(f, want) {
				msg = append(msg, d.Serialize()...)
			}
			got, err := decodeRule(msg)
			if err != nil || got != want {
				t.Errorf("got %+v, %v, want %+v", got, err, want)
			}
		}
	}
}

func FuzzDecodeRule(f *testing.F) {
	for _, r := range guardRules(ipv6, 0) {
		var msg []byte
		for _, d := range encodeRule(ipv6, r) {
			msg = append(msg, d.Serialize()...)
		}
		f.Add(msg)
	}
	f.Fuzz(func(t *testing.T, msg []byte) {
		if r, err := decodeRule(msg); err == nil {
			_ = r.String()
			_ = r.ours(ipv4)
		}
		_ = aboutUs(syscall.NetlinkMessage{Header: syscall.NlMsghdr{Type: unix.NFT_MSG_NEWRULE}, Data: msg})
	})
}

// Somebody deletes rules in the middle of a repair, as `ip rule flush` does: no step of the plan takes away what refuses pods.
func TestPlanGuardAgainstAFlush(t *testing.T) {
	want := guardRules(ipv4, 100)
	for _, have := range []ruleList{{want[2], want[0]}, {want[2], want[1], want[0]}, {want[2]}} {
		plan := planGuard(ipv4, 100, have)
		for at := range plan {
			for _, gone := range want {
				l := have
				for i, op := range plan {
					if i == at {
						l, _ = l.apply(ruleOp{del: true, rule: gone})
					}
					closed := l.refuses(ipv4, "eth1")
					l, _ = l.apply(op)
					if closed && !l.refuses(ipv4, "eth1") {
						t.Errorf("from %v, with %q gone before step %d: %q opens the endpoint: %v", have, gone, at, op, l)
					}
				}
			}
		}
	}
}
