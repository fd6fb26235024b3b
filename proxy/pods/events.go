package pods

import (
	"context"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/tools/record/util"

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
	eventTextLimit = 1024 // the API's limit, in bytes
)

type report struct {
	pod              proxy.Pod
	onServiceAccount bool
	reason, text     string
}

// events writes reports as Events: aggregated and limited by client-go's correlator, one at a time. client-go's own
// broadcaster is not used: it outlives its context and retries each event for minutes before the next.
type events struct {
	client *rest.RESTClient
	node   string
	log    *slog.Logger
	queue  chan report

	mu     sync.Mutex
	recent map[recentKey]time.Time
}

type recentKey struct{ namespace, name, uid, reason string }

func newEvents(client *rest.RESTClient, node string, log *slog.Logger) *events {
	return &events{
		client: client, node: node, log: log,
		queue: make(chan report, eventQueue), recent: make(map[recentKey]time.Time),
	}
}

// Report implements proxy.Reporter.
func (p *Pods) Report(pod proxy.Pod, onServiceAccount bool, reason, text string) {
	p.events.report(report{pod, onServiceAccount, reason, text})
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

func (e *events) run(ctx context.Context) {
	correlator := record.NewEventCorrelatorWithOptions(record.CorrelatorOptions{
		BurstSize: eventBurst,
		QPS:       float32(1 / eventRefill.Seconds()),
		SpamKeyFunc: func(ev *corev1.Event) string {
			o := ev.InvolvedObject
			return o.Kind + "/" + o.Namespace + "/" + o.Name + "/" + string(o.UID) + "/" + ev.Reason
		},
	})
	for {
		select {
		case <-ctx.Done():
			return
		case r := <-e.queue:
			e.write(ctx, correlator, e.event(r))
		}
	}
}

func (e *events) event(r report) *corev1.Event {
	about := corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: r.pod.Namespace, Name: r.pod.Name, UID: types.UID(r.pod.UID)}
	if r.onServiceAccount {
		about.Kind, about.Name, about.UID = "ServiceAccount", r.pod.ServiceAccount, ""
	}
	if len(r.text) > eventTextLimit {
		r.text = r.text[:eventTextLimit]
	}
	now := metav1.Now()
	return &corev1.Event{
		ObjectMeta:          metav1.ObjectMeta{Namespace: about.Namespace, Name: util.GenerateEventName(about.Name, now.UnixNano())},
		InvolvedObject:      about,
		Reason:              r.reason,
		Message:             r.text,
		Type:                corev1.EventTypeWarning,
		FirstTimestamp:      now,
		LastTimestamp:       now,
		Count:               1,
		Source:              corev1.EventSource{Component: eventComponent, Host: e.node},
		ReportingController: eventComponent,
		ReportingInstance:   e.node,
	}
}

// write creates an Event, or counts it on one that is there. It does not try again: what causes it will happen again.
func (e *events) write(ctx context.Context, correlator *record.EventCorrelator, ev *corev1.Event) {
	result, err := correlator.EventCorrelate(ev)
	if err != nil {
		e.log.Warn("cannot aggregate an event", "error", err)
	}
	if result.Skip {
		return
	}
	ev = result.Event
	var written corev1.Event
	verb := "patch"
	if ev.Count > 1 {
		err = e.client.Patch(types.StrategicMergePatchType).Namespace(ev.Namespace).Resource("events").Name(ev.Name).
			Body(result.Patch).Do(ctx).Into(&written)
	}
	if ev.Count == 1 || apierrors.IsNotFound(err) { // events expire after an hour
		verb, ev.ResourceVersion = "create", ""
		err = e.client.Post().Namespace(ev.Namespace).Resource("events").Body(ev).Do(ctx).Into(&written)
	}
	switch {
	case err == nil:
		correlator.UpdateState(&written)
	case ctx.Err() != nil, apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
	default:
		e.log.Warn("cannot write an event", "namespace", ev.Namespace, "object", ev.InvolvedObject.Name, "reason", ev.Reason,
			"error", explainForbidden(err, verb, "events"))
	}
}
