package pods

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/imdsgate/imdsgate/proxy"
)

// Limits on Events. A pod that asks a thousand times a second for a role it may not have is told so a thousand times a
// second, and its owner once.
const (
	eventComponent = "imdsgate"
	eventQueue     = 256              // reports that wait for the API server; further ones are dropped
	eventInterval  = 10 * time.Second // between reports of one reason about one pod that are looked at
	eventBurst     = 5                // writes per object and reason, then one per eventRefill
	eventRefill    = 5 * time.Minute
	eventTextLimit = 1024             // the API's limit, in bytes
	eventTTL       = time.Hour        // the API server's default
	eventSeries    = 1024             // remembered
	eventTimeout   = 10 * time.Second // of a write, while the others wait
)

type report struct {
	pod              proxy.Pod
	onServiceAccount bool
	reason, text     string
}

// events writes reports as Events, one at a time; repetitions are counted on the Event that is there. client-go's recorder
// is not used: it outlives its context, retries each event for minutes before the next, and brings seventy packages.
type events struct {
	client *rest.RESTClient
	node   string
	log    *slog.Logger
	uid    func(types.NamespacedName) types.UID // of a service account: kubectl describe asks for Events by UID
	queue  chan report

	mu     sync.Mutex
	recent map[recentKey]time.Time
}

type recentKey struct{ namespace, name, uid, reason string }

func newEvents(client *rest.RESTClient, node string, log *slog.Logger, uid func(types.NamespacedName) types.UID) *events {
	return &events{
		client: client, node: node, log: log, uid: uid,
		queue: make(chan report, eventQueue), recent: make(map[recentKey]time.Time),
	}
}

// Report implements proxy.Reporter.
func (p *Pods) Report(pod proxy.Pod, onServiceAccount bool, reason, text string) {
	p.events.report(report{pod, onServiceAccount, reason, text})
}

// CanReport finds out, for -check, whether Events can be written; it writes none.
func (p *Pods) CanReport(ctx context.Context) error {
	ev := p.events.event(report{pod: proxy.Pod{Namespace: metav1.NamespaceDefault, Name: "imdsgate-check"}, reason: proxy.EventNoRole, text: "imdsgate -check"})
	err := p.client.Post().Namespace(ev.Namespace).Resource("events").
		VersionedParams(&metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}, metav1.ParameterCodec).Body(ev).Do(ctx).Error()
	if err != nil {
		return fmt.Errorf("write Events: %w", explainForbidden(err, "create", "events"))
	}
	return nil
}

func (e *events) report(r report) {
	if !e.due(r, time.Now()) {
		return
	}
	select {
	case e.queue <- r:
	default:
	}
}

// due keeps floods away from the queue. What it remembers is bounded by the pods that reported within eventInterval.
func (e *events) due(r report, now time.Time) bool {
	key := recentKey{r.pod.Namespace, r.pod.Name, r.pod.UID, r.reason}
	e.mu.Lock()
	defer e.mu.Unlock()
	if now.Sub(e.recent[key]) < eventInterval {
		return false
	}
	if len(e.recent) >= eventQueue {
		for k, t := range e.recent {
			if now.Sub(t) >= eventInterval {
				delete(e.recent, k)
			}
		}
	}
	e.recent[key] = now
	return true
}

// series are the reports of one reason about one object, on one Event.
type series struct {
	limit *rate.Limiter
	name  string // of the Event; empty: none was written
	count int32
	last  time.Time
}

func (e *events) run(ctx context.Context) {
	known := make(map[seriesKey]*series)
	for {
		select {
		case <-ctx.Done():
			return
		case r := <-e.queue:
			ev := e.event(r)
			e.write(ctx, e.series(known, ev), ev)
		}
	}
}

type seriesKey struct {
	object corev1.ObjectReference
	reason string
}

// series finds or begins one; it forgets those that the API server has forgotten, and in need any.
func (e *events) series(known map[seriesKey]*series, ev *corev1.Event) *series {
	key := seriesKey{ev.InvolvedObject, ev.Reason}
	s := known[key]
	if s == nil {
		for k, old := range known {
			if ev.LastTimestamp.Sub(old.last) > eventTTL || len(known) >= eventSeries {
				delete(known, k)
			}
		}
		s = &series{limit: rate.NewLimiter(rate.Every(eventRefill), eventBurst)}
		known[key] = s
	}
	s.count++
	s.last = ev.LastTimestamp.Time
	return s
}

func (e *events) event(r report) *corev1.Event {
	about := corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: r.pod.Namespace, Name: r.pod.Name, UID: types.UID(r.pod.UID)}
	if r.onServiceAccount {
		about.Kind, about.Name = "ServiceAccount", r.pod.ServiceAccount
		about.UID = e.uid(types.NamespacedName{Namespace: r.pod.Namespace, Name: r.pod.ServiceAccount})
	}
	if len(r.text) > eventTextLimit {
		r.text = strings.ToValidUTF8(r.text[:eventTextLimit], "")
	}
	kind := corev1.EventTypeWarning
	if r.reason == proxy.EventNoRole {
		kind = corev1.EventTypeNormal
	}
	now := metav1.Now()
	return &corev1.Event{
		ObjectMeta:          metav1.ObjectMeta{Namespace: about.Namespace, Name: eventName(about.Name, now.Time)},
		InvolvedObject:      about,
		Reason:              r.reason,
		Message:             r.text,
		Type:                kind,
		FirstTimestamp:      now,
		LastTimestamp:       now,
		Count:               1,
		Source:              corev1.EventSource{Component: eventComponent, Host: e.node},
		ReportingController: eventComponent,
		ReportingInstance:   e.node,
	}
}

// eventName is what kubectl and the recorder of client-go use: <object>.<time>, within the 253 bytes of a name.
func eventName(object string, now time.Time) string {
	suffix := fmt.Sprintf(".%x", now.UnixNano())
	return strings.TrimRight(object[:min(len(object), 253-len(suffix))], ".-") + suffix
}

// write creates a series' Event, or counts on it. It does not try again: what causes it will happen again.
func (e *events) write(ctx context.Context, s *series, ev *corev1.Event) {
	if !s.limit.AllowN(s.last, 1) {
		return // counted with the next
	}
	ev.Count = s.count
	attempt, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	verb, err := "patch", error(nil)
	if s.name != "" {
		var patch []byte
		if patch, err = json.Marshal(map[string]any{"count": ev.Count, "lastTimestamp": ev.LastTimestamp, "message": ev.Message}); err == nil {
			err = e.client.Patch(types.MergePatchType).Namespace(ev.Namespace).Resource("events").Name(s.name).Body(patch).Do(attempt).Error()
		}
	}
	if s.name == "" || apierrors.IsNotFound(err) { // Events expire
		verb, err = "create", e.client.Post().Namespace(ev.Namespace).Resource("events").Body(ev).Do(attempt).Error()
		if err == nil {
			s.name = ev.Name
		}
	}
	if err == nil || ctx.Err() != nil || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		return
	}
	e.log.Warn("cannot write an event", "namespace", ev.Namespace, "object", ev.InvolvedObject.Name, "reason", ev.Reason,
		"error", explainForbidden(err, verb, "events"))
}
