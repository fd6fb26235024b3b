package pods

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/imdsgate/imdsgate/proxy"
)

// resident is a pod of this node and what was decided about it. Guarded by Pods.mu.
type resident struct {
	facts
	since     time.Time // see Caller.Since
	taken     time.Time // on by the kubelet, before its sandbox was made: status.startTime, if it is certain
	account   *used     // nil if it has none, or is not serving
	namespace *used     // nil if account is
	caller    *proxy.Caller
	conflict  string
	withdrawn map[netip.Addr]*loss // addresses of its former sandboxes: their CNI results were removed
}

// used is a service account or a namespace that pods of this node use; it is watched as long as there are any.
type used struct {
	object
	name  types.NamespacedName // of a namespace: Name alone
	known bool                 // seen, or found absent
	rules *proxy.NamespaceRules
	by    map[*resident]struct{}
	stop  context.CancelFunc
}

// change collects what an event touched, to be told after it was applied.
type change struct {
	ips      map[netip.Addr]struct{}
	accounts map[types.NamespacedName]struct{}
	reports  []report
}

func (c *change) touch(ips ...netip.Addr) {
	for _, ip := range ips {
		c.ips[ip] = struct{}{}
	}
}

// update applies an event, publishes the answers it touched, and then, without the lock, wakes and tells.
func (p *Pods) update(apply func(*change)) {
	c := &change{ips: make(map[netip.Addr]struct{}), accounts: make(map[types.NamespacedName]struct{})}
	p.mu.Lock()
	apply(c)
	p.publish(c)
	synced := p.becameSynced()
	p.mu.Unlock()
	for ip := range c.ips {
		p.waiting.wake(ip)
		p.moved(ip)
	}
	for _, r := range c.reports {
		p.events.report(r)
	}
	if p.onChange != nil {
		for a := range c.accounts {
			p.onChange(a.Namespace, a.Name)
		}
	}
	if synced {
		p.log.Info("pods synced", "node", p.node, "pods", p.count.Load())
	}
}

// moved tells whose an IP is now. One after the other, or an older answer could be told last.
func (p *Pods) moved(ip netip.Addr) {
	p.moving.Lock()
	defer p.moving.Unlock()
	table := p.table.Load()
	if p.onMove == nil || table == nil {
		return
	}
	uid := ""
	if place := (*table)[ip]; place != nil {
		if c := place.Load().caller; c != nil {
			uid = c.Pod.UID
		}
	}
	p.onMove(ip, uid)
}

// publish replaces what changed of the table, and reduces c.ips to that.
func (p *Pods) publish(c *change) {
	if !p.listed {
		return
	}
	old := p.table.Load()
	var next map[netip.Addr]*atomic.Pointer[answer]
	if old == nil {
		next = make(map[netip.Addr]*atomic.Pointer[answer], len(p.byIP))
		old = &next
	}
	for ip := range c.ips {
		var was answer
		place := (*old)[ip]
		had := place != nil
		if had {
			was = *place.Load()
		}
		is, has := p.holder(ip)
		if errors.Is(is.err, proxy.ErrAmbiguousIP) && !errors.Is(was.err, proxy.ErrAmbiguousIP) {
			p.ambiguous.Do(func() { p.log.Warn("pods have the same IP: nobody is served there", "ip", ip, "pods", p.names(ip)) })
			c.reports = append(c.reports, p.ambiguity(ip)...)
		}
		if had == has && (was == is || !has) {
			delete(c.ips, ip)
			continue
		}
		if had && has {
			place.Store(&is)
			continue
		}
		if next == nil {
			next = maps.Clone(*old)
		}
		if has {
			next[ip] = new(atomic.Pointer[answer])
			next[ip].Store(&is)
		} else {
			delete(next, ip)
		}
	}
	if next != nil {
		p.table.Store(&next)
	}
}

// holder decides who holds an IP: the pod of the newest CNI result for it; without any, the single pod that is not
// terminating, else the single one that is.
func (p *Pods) holder(ip netip.Addr) (answer, bool) {
	if len(p.claims.byIP[ip]) > 0 {
		a := p.claimant(ip)
		return a, !errors.Is(a.err, proxy.ErrUnknownIP) // files of unknown pods take no room in the table
	}
	pods := p.byIP[ip]
	if len(p.claims.losses) > 0 {
		pods = slices.DeleteFunc(slices.Clone(pods), func(r *resident) bool { return r.lost(ip) })
	}
	if len(pods) > 1 {
		if stay := slices.DeleteFunc(slices.Clone(pods), func(r *resident) bool { return r.terminating }); len(stay) > 0 {
			pods = stay
		}
	}
	switch {
	case len(pods) == 0:
		return answer{err: proxy.ErrUnknownIP}, false
	case len(pods) > 1:
		return answer{err: proxy.ErrAmbiguousIP}, true
	}
	return apiAnswer(pods[0]), true
}

// apiAnswer is that of a pod that holds an IP by the API server's word.
func apiAnswer(r *resident) answer {
	if r.caller == nil {
		return answer{err: proxy.ErrIncomplete}
	}
	return answer{caller: r.caller}
}

// names are the pods that have an IP by either source.
func (p *Pods) names(ip netip.Addr) []string {
	var list []string
	for _, r := range p.byIP[ip] {
		list = append(list, r.pod.Namespace+"/"+r.pod.Name)
	}
	for _, cl := range p.claims.byIP[ip] {
		list = append(list, cl.namespace+"/"+cl.name)
	}
	slices.Sort(list)
	return slices.Compact(list)
}

func (p *Pods) becameSynced() bool {
	if !p.listed || p.Synced() {
		return false
	}
	for _, r := range p.pods {
		if r.serving() && r.caller == nil {
			return false
		}
	}
	close(p.synced)
	return true
}

// replace takes a complete list.
func (p *Pods) replace(c *change, list []facts, now time.Time) {
	here := make(map[string]struct{}, len(list))
	for _, f := range list {
		here[f.pod.UID] = struct{}{}
	}
	for uid, r := range p.pods {
		if _, ok := here[uid]; !ok {
			p.remove(c, r)
		}
	}
	var seen time.Time // of pods that came since the last contact
	if last := p.contact.last; !last.IsZero() {
		seen = last.Add(-catchUp)
	}
	for _, f := range list {
		p.upsert(c, f, now, seen)
	}
	p.listed, p.contact.last, p.contact.before = true, now, now
}

// upsert takes a pod as it is now. seen bounds the beginning of pods that are new; zero: nothing known.
func (p *Pods) upsert(c *change, f facts, now, seen time.Time) {
	if f.node != p.node {
		p.remove(c, p.pods[f.pod.UID]) // the field selector keeps others away; never rest on it
		return
	}
	old := p.pods[f.pod.UID]
	cur := old
	if old == nil {
		cur = &resident{since: seen}
		p.pods[f.pod.UID] = cur
	}
	was := cur.facts
	cur.facts = f
	cur.taken = later(cur.taken, lowerBound(was.started, f.started, now))
	cur.since = later(cur.since, cur.taken)
	cur.since = later(cur.since, lowerBound(was.firstRun, f.firstRun, now))
	c.touch(was.ips...)
	c.touch(f.ips...)
	if !slices.Equal(was.ips, f.ips) {
		p.unindex(cur, was.ips)
		for _, ip := range f.ips {
			p.byIP[ip] = append(p.byIP[ip], cur)
		}
	}
	wasServing := old != nil && was.serving()
	if f.serving() != wasServing {
		if f.serving() {
			p.attach(cur)
			p.count.Add(1)
		} else {
			p.detach(cur)
			p.count.Add(-1)
		}
		c.accounts[cur.accountName()] = struct{}{}
	}
	if !maps.Equal(was.annotations, f.annotations) {
		c.accounts[cur.accountName()] = struct{}{}
		cur.caller = nil
	}
	p.decide(c, cur)
}

// remove forgets a pod; nil is none.
func (p *Pods) remove(c *change, r *resident) {
	if r == nil {
		return
	}
	delete(p.pods, r.pod.UID)
	p.unindex(r, r.ips)
	c.touch(p.ipsOf(r)...)
	if r.serving() {
		p.detach(r)
		p.count.Add(-1)
		c.accounts[r.accountName()] = struct{}{}
	}
}

// ipsOf are the addresses of a pod by both sources.
func (p *Pods) ipsOf(r *resident) []netip.Addr {
	claims := p.claimsOf(r)
	if len(claims) == 0 {
		return r.ips
	}
	ips := slices.Clone(r.ips)
	for _, cl := range claims {
		for _, ip := range cl.ips {
			if !slices.Contains(ips, ip) {
				ips = append(ips, ip)
			}
		}
	}
	return ips
}

func (p *Pods) unindex(r *resident, ips []netip.Addr) {
	for _, ip := range ips {
		p.byIP[ip] = slices.DeleteFunc(p.byIP[ip], func(q *resident) bool { return q == r })
		if len(p.byIP[ip]) == 0 {
			delete(p.byIP, ip)
		}
	}
}

func (r *resident) accountName() types.NamespacedName {
	return types.NamespacedName{Namespace: r.pod.Namespace, Name: r.pod.ServiceAccount}
}

// attach follows the objects that a pod's decision rests on.
func (p *Pods) attach(r *resident) {
	if r.pod.ServiceAccount == "" {
		return // then there is no role, whatever the namespace says
	}
	r.namespace = p.use(p.namespaces, types.NamespacedName{Name: r.pod.Namespace}, r, p.followNamespace)
	r.account = p.use(p.accounts, r.accountName(), r, p.followAccount)
}

func (p *Pods) detach(r *resident) {
	p.unuse(p.namespaces, r.namespace, r)
	p.unuse(p.accounts, r.account, r)
	r.namespace, r.account, r.caller = nil, nil, nil
}

func (p *Pods) use(all map[types.NamespacedName]*used, name types.NamespacedName, by *resident, follow func(context.Context, *used)) *used {
	u := all[name]
	if u == nil {
		u = &used{name: name, by: make(map[*resident]struct{})}
		all[name] = u
		u.stop = p.spawn(func(ctx context.Context) { follow(ctx, u) })
	}
	u.by[by] = struct{}{}
	return u
}

func (p *Pods) unuse(all map[types.NamespacedName]*used, u *used, by *resident) {
	if u == nil {
		return
	}
	delete(u.by, by)
	if len(u.by) == 0 {
		delete(all, u.name)
		u.stop()
	}
}

func (p *Pods) accountUID(name types.NamespacedName) types.UID {
	p.mu.Lock()
	defer p.mu.Unlock()
	if u := p.accounts[name]; u != nil {
		return u.uid
	}
	return ""
}

// seen takes a service account or namespace as it is now.
func (p *Pods) seen(c *change, u *used, o object) {
	if u.known && u.object.equal(o) {
		return
	}
	u.object, u.known = o, true
	if u.name.Namespace == "" {
		u.rules = nil // of a namespace that does not exist: nothing is permitted
		if o.present {
			u.rules = p.policy.Compile(o.annotations)
		}
	}
	for r := range u.by {
		c.accounts[r.accountName()] = struct{}{}
		r.caller = nil
		p.decide(c, r)
	}
}

// decide sets a pod's caller, if everything that the decision rests on is known: a default would be a guess.
func (p *Pods) decide(c *change, r *resident) {
	c.touch(p.ipsOf(r)...)
	if !r.serving() {
		return
	}
	if r.caller != nil { // decided before; only the pod's status changed
		if !r.caller.Since.Equal(r.since) {
			caller := *r.caller
			caller.Since = r.since
			r.caller = &caller
		}
		return
	}
	s := proxy.Subject{Pod: r.pod, PodAnnotations: r.annotations}
	if r.account != nil {
		if !r.account.known || !r.namespace.known {
			return
		}
		s.ServiceAccountAnnotations, s.ServiceAccountAbsent = r.account.annotations, !r.account.present
		s.Namespace = r.namespace.rules
	}
	grant, refusal, conflict := p.policy.Authorize(s)
	r.caller = &proxy.Caller{Pod: r.pod, Since: r.since, Grant: grant, Refusal: refusal}
	if conflict != "" && conflict != r.conflict {
		c.reports = append(c.reports, report{r.pod, false, proxy.EventRoleConflict, conflict})
	}
	r.conflict = conflict
}

// lowerBound is what a time of the pod's status says about when the pod began to use its IP, if it is certain: was and is
// are the values before and now. A time in the future was written by a clock that is not ours; it says nothing, then or
// later.
func lowerBound(was, is, now time.Time) time.Time {
	floor := is.Truncate(time.Second)
	if is.Equal(was) || floor.After(now) {
		return time.Time{}
	}
	return floor
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}
