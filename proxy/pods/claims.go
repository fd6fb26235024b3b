package pods

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/imdsgate/imdsgate/proxy"
)

// Sources of identity: values of the label source.
type source int

const (
	sourceAPI source = iota
	sourceCNI
	sources
)

func (s source) String() string { return [sources]string{"api", "cni"}[s] }

// Bounds on what is kept of CNI results.
const (
	maxResults   = 4096 // the newest; 110 pods are usual on a node, but runtimes have been seen to leave thousands behind
	maxWithdrawn = 64   // addresses of one pod's former sandboxes
)

// reportDelay is how long the API server may go on showing an address that a pod has lost: the kubelet's reports were up to 6 s
// late on a node that started 80 pods at once.
const reportDelay = 30 * time.Second

// claim is a CNI result that is in force. Guarded by Pods.mu.
type claim struct {
	result
	at    time.Time // when it was written
	since time.Time // at; zero if it lies in the future: another clock's
	seq   uint64    // grows with the order in which results were seen to come; those of one listing share it

	of, caller *proxy.Caller // caller is of with this claim's Since
}

// claims are the CNI results, as far as they may be believed. Guarded by Pods.mu.
type claims struct {
	byFile map[string]*claim
	byIP   map[netip.Addr][]*claim
	byUID  map[string][]*claim
	seq    uint64
	max    int     // that are kept
	losses []*loss // in the order of their ends
}

// loss is that a sandbox has lost an address, because its result was removed, while its pod still has it by the API server.
type loss struct {
	ip  netip.Addr
	end time.Time // of reportDelay; zero: it has ended
}

func newClaims() claims {
	return claims{byFile: make(map[string]*claim), byIP: make(map[netip.Addr][]*claim), byUID: make(map[string][]*claim), max: maxResults}
}

// claim takes a result file as it is now; nil if it says nothing. gone: because it was removed, so its sandbox is no more.
func (p *Pods) claim(c *change, file string, is *claim, gone bool) {
	was := p.claims.byFile[file]
	if was != nil && is != nil && was.at.Equal(is.at) && was.equal(&is.result) {
		return
	}
	if was != nil {
		p.unclaim(c, file, was)
		if gone {
			p.withdraw(c, was)
		}
	}
	if is == nil {
		return
	}
	is.seq = p.claims.seq
	p.claims.byFile[file] = is
	p.claims.byUID[is.uid] = append(p.claims.byUID[is.uid], is)
	for _, ip := range is.ips {
		p.claims.byIP[ip] = append(p.claims.byIP[ip], is)
	}
	p.touch(c, is)
	if len(p.claims.byFile) > p.claims.max {
		p.dropOldest(c)
	}
}

func (p *Pods) unclaim(c *change, file string, cl *claim) {
	delete(p.claims.byFile, file)
	drop(p.claims.byUID, cl.uid, cl)
	for _, ip := range cl.ips {
		drop(p.claims.byIP, ip, cl)
	}
	p.touch(c, cl)
}

// touch notes the addresses about which a claim matters: its own, and those that its pod has by the API server (successor).
func (p *Pods) touch(c *change, cl *claim) {
	c.touch(cl.ips...)
	if r := p.sandboxed(cl); r != nil {
		c.touch(r.ips...)
	}
}

func drop[K comparable](index map[K][]*claim, key K, cl *claim) {
	index[key] = slices.DeleteFunc(index[key], func(o *claim) bool { return o == cl })
	if len(index[key]) == 0 {
		delete(index, key)
	}
}

// dropOldest makes room. Of an address, the newest claim goes last, so that no older one is ever taken for the newest.
func (p *Pods) dropOldest(c *change) {
	type named struct {
		file string
		*claim
	}
	all := make([]named, 0, len(p.claims.byFile))
	for file, cl := range p.claims.byFile {
		all = append(all, named{file, cl})
	}
	slices.SortFunc(all, func(a, b named) int { return cmp.Or(a.at.Compare(b.at), cmp.Compare(a.seq, b.seq)) })
	for _, old := range all[:len(all)-p.claims.max*15/16] {
		p.unclaim(c, old.file, old.claim)
	}
}

// withdraw notes that a pod has lost addresses, whatever the API server still says.
func (p *Pods) withdraw(c *change, cl *claim) {
	r := p.sandboxed(cl)
	if r == nil {
		return
	}
	for _, ip := range cl.ips {
		if r.withdrawn == nil || len(r.withdrawn) >= maxWithdrawn {
			r.withdrawn = make(map[netip.Addr]*loss)
		}
		l := &loss{ip, time.Now().Add(p.results.delay)}
		r.withdrawn[ip] = l
		if p.claims.losses = append(p.claims.losses, l); len(p.claims.losses) > maxResults {
			p.settle(c, p.claims.losses[0].end)
		}
	}
}

// settle lets the API server's word count again about addresses that were lost so long ago that it must have heard of it.
func (p *Pods) settle(c *change, now time.Time) {
	for len(p.claims.losses) > 0 && !p.claims.losses[0].end.After(now) {
		l := p.claims.losses[0]
		l.end = time.Time{}
		p.claims.losses = p.claims.losses[1:]
		c.touch(l.ip)
	}
}

// lost says whether a pod has lost an address so lately that the API server may not have heard of it.
func (r *resident) lost(ip netip.Addr) bool {
	l := r.withdrawn[ip]
	return l != nil && !l.end.IsZero()
}

// sandboxed finds the pod of a claim. A static pod's mirror has a UID of its own, and names the static pod's in an
// annotation; an annotation never stands against a pod's own UID.
func (p *Pods) sandboxed(cl *claim) *resident {
	r := p.pods[cl.uid]
	if r == nil {
		for _, mirror := range p.pods {
			if mirror.static != cl.uid {
				continue
			}
			if r != nil {
				return nil
			}
			r = mirror
		}
	}
	if r == nil || r.pod.Namespace != cl.namespace || r.pod.Name != cl.name {
		return nil
	}
	return r
}

// claimsOf are the claims that sandboxed may find a pod for.
func (p *Pods) claimsOf(r *resident) []*claim {
	own := p.claims.byUID[r.pod.UID]
	if r.static == "" || r.static == r.pod.UID {
		return own
	}
	return slices.Concat(own, p.claims.byUID[r.static])
}

// claimant decides who holds an IP that is in CNI results: the pod of the newest, never another one.
func (p *Pods) claimant(ip netip.Addr) answer {
	all := p.claims.byIP[ip]
	newest := slices.MaxFunc(all, func(a, b *claim) int { return cmp.Or(a.at.Compare(b.at), cmp.Compare(a.seq, b.seq)) })
	for _, cl := range all {
		// Written at once, or the clock was set back between the two: then the times say nothing.
		if cl.uid != newest.uid && (cl.at.Equal(newest.at) || cl.seq > newest.seq || p.elsewhere(cl, newest)) {
			return answer{err: proxy.ErrAmbiguousIP}
		}
	}
	r := p.sandboxed(newest)
	if r == nil || !r.serving() {
		if o := p.successor(newest, ip); o != nil {
			return apiAnswer(o)
		}
		return answer{err: proxy.ErrUnknownIP}
	}
	for _, o := range p.byIP[ip] {
		if o != r && !o.terminating && !p.gaveUp(o, ip) {
			return answer{err: proxy.ErrAmbiguousIP}
		}
	}
	if r.caller == nil {
		return answer{err: proxy.ErrIncomplete}
	}
	return answer{caller: newest.callerOf(r), source: sourceCNI}
}

// elsewhere says whether a claim holds beside a newer one: networks may give one address each, so that only of a later result of
// the same network and interface it follows that the address has left its earlier pod.
func (p *Pods) elsewhere(cl, newer *claim) bool {
	if cl.network == newer.network && cl.ifName == newer.ifName {
		return false
	}
	r := p.sandboxed(cl)
	return r != nil && r.serving()
}

// successor is the pod that certainly came to an IP after a result whose pod is not served: a file that a runtime left behind
// must not keep the IP for ever. It is the single pod that stays there by the API server's word, was taken on by the kubelet
// after the result was written, so its sandbox is the later one, and has no result that would say otherwise.
func (p *Pods) successor(left *claim, ip netip.Addr) *resident {
	var last *resident
	for _, o := range p.byIP[ip] {
		if o.terminating || o.lost(ip) {
			continue
		}
		if last != nil {
			return nil
		}
		last = o
	}
	if last == nil || !left.at.Before(last.taken) || len(p.claimsOf(last)) > 0 {
		return nil
	}
	return last
}

// gaveUp says whether a pod that has an IP by the API server, while another one's result for it is the newest, had it before.
func (p *Pods) gaveUp(o *resident, ip netip.Addr) bool {
	if _, ok := o.withdrawn[ip]; ok {
		return true
	}
	return slices.ContainsFunc(p.claimsOf(o), func(cl *claim) bool { return p.sandboxed(cl) == o && slices.Contains(cl.ips, ip) })
}

// callerOf is the pod's caller with the better bound of when it began to use this IP.
func (cl *claim) callerOf(r *resident) *proxy.Caller {
	if !r.caller.Since.Before(cl.since) {
		return r.caller
	}
	if cl.of != r.caller {
		caller := *r.caller
		caller.Since = cl.since
		cl.of, cl.caller = r.caller, &caller
	}
	return cl.caller
}
